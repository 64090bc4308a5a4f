"""The shipped graphs of inversion: a picture comes back from its noise, and with a word of its prompt exchanged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..drawing import Drawing, Node, Output
from .pieces import CFG, MODEL_NOTE, SEED, Pieces

STEPS, SCHEDULER = 50, "ddim_uniform"  # the sampling of the papers
SOURCE = "a photo of a cat on a sofa"
WORD, REPLACEMENT = "cat", "dog"
BLEND, UNTIL = 0.5, 0.4  # what kept most of the background in the small world
METHODS = ("null-text", "negative prompt", "direct")
DIRECT = METHODS[2]  # negatives near the source prompt, as null-text makes them, hinder edits
STEPS_NOTE = (
    "All samplings use the noise levels of 'Steps' (ddim_uniform; 10, 20, 25, 40 or 50 steps come out as asked), the "
    "euler sampler and "
)
LEVELS = STEPS_NOTE + (
    "no added noise (DisableNoise): the inverted picture is the noise. The cfg of Null-Text and of all guiders must be "
    "the same.\n\n"
)
FRESH_LEVELS = STEPS_NOTE + "the noise of 'Noise'. Keep one cfg in all guiders (and in 'Guide by the reference').\n\n"
ADVICE = (
    "When the background changes, raise blend (0.6, 0.7), or connect a mask too: white where the picture may change. "
    "When the new subject is cut off, lower blend (0.4, 0.3). When it keeps the old one's shape, lower end_percent "
    "(0.3, 0.2).\n\n"
)


@dataclass(frozen=True)
class Levels:
    """What every sampling of a graph shares."""

    sampler: Output
    sigmas: Output
    no_noise: Output | None


class Inverted(Pieces):
    """Sampling along one list of noise levels, and the way of a picture along it."""

    def levels(self, model: Node, steps: int = STEPS, noiseless: bool = True) -> Levels:
        sigmas = self.draw.node("BasicScheduler", "Steps", model=model["MODEL"], scheduler=SCHEDULER, steps=steps)
        sampler = self.draw.node("KSamplerSelect", "Sampler", sampler_name="euler")
        no_noise = self.draw.node("DisableNoise")["NOISE"] if noiseless else None
        return Levels(sampler["SAMPLER"], sigmas["SIGMAS"], no_noise)

    def invert(self, title: str, model: Output, picture: Output, positive: Output, vae: Output, levels: Levels) -> Node:
        return self.draw.node(
            "LikenessInvert", title, model=model, positive=positive, sigmas=levels.sigmas, image=picture, vae=vae
        )

    def back(self, title: str, model: Node, positive: Output, negative: Output, inverted: Node, method: str) -> Node:
        return self.draw.node(
            "LikenessNullText",
            title,
            extra=140,
            model=model["MODEL"],
            positive=positive,
            negative=negative,
            trajectory=inverted["trajectory"],
            method=method,
            cfg=CFG,
        )

    def exact(
        self,
        title: str,
        model: Output,
        positive: Output,
        negative: Output,
        latent: Output,
        levels: Levels,
        noise: Output | None = None,
    ) -> Output:
        """SamplerCustomAdvanced from this latent, without added noise unless some is given."""
        guider = self.draw.node(
            "CFGGuider", f"{title}: guider", model=model, positive=positive, negative=negative, cfg=CFG
        )
        sampled = self.draw.node(
            "SamplerCustomAdvanced",
            title,
            extra=260,
            noise=levels.no_noise if noise is None else noise,
            guider=guider["GUIDER"],
            sampler=levels.sampler,
            sigmas=levels.sigmas,
            latent_image=latent,
        )
        return sampled["output"]

    def noise(self) -> Output:
        return self.draw.node("RandomNoise", "Noise", noise_seed=SEED)["NOISE"]

    def save(self, title: str, image: Output, name: str) -> Node:
        return self.draw.node("SaveImage", title, images=image, filename_prefix=f"likeness/{name}")


def reconstruct(draw: Drawing) -> None:
    """A picture, its noise, and four ways back."""
    make = Inverted(draw)
    draw.note(
        "# Invert a picture and get it back\nFinds the noise that a picture would have come from, and samples from it "
        "with guidance in four ways: with the plain empty negative prompt (which drifts away), with a negative prompt "
        "that Null-Text has optimised for each step, with the prompt as its own negative, and with direct inversion. "
        "'Scores' tells how near each comes (PSNR in dB, in this order); the last one is what the autoencoder gives "
        "back, the most that can be reached.\n\n**First** load your picture (it is cut to a 512 x 512 square) and "
        "describe it plainly in 'Prompt of the picture'.\n\nNothing here needs to run first for 'invert_and_edit': it"
        " inverts by itself, and comes back by direct inversion, because negatives near the prompt hinder edits.\n\n"
        + LEVELS
        + MODEL_NOTE,
        780,
    )
    model = make.model()
    draw.column()
    picture = make.subject("Picture to invert")
    encoded = draw.node("VAEEncode", "Encoded", pixels=picture, vae=model["VAE"])["LATENT"]
    round_trip = make.decode(encoded, model)
    draw.column()
    positive = make.prompt("Prompt of the picture", model["CLIP"], SOURCE)
    empty = make.prompt("Empty prompt", model["CLIP"], "")
    levels = make.levels(model)
    draw.column()
    inverted = make.invert("Invert", model["MODEL"], picture, positive, model["VAE"], levels)
    ways = [make.back(f"Way back: {method}", model, positive, empty, inverted, method) for method in METHODS]
    draw.column()
    draw.node("LossGraphNode", "Loss of null-text", extra=260, loss=ways[0]["loss"], filename_prefix="likeness/loss")
    draw.node("PreviewAny", "Report of null-text", extra=160, source=ways[0]["report"])
    draw.column()
    start = inverted["latent"]
    latents = [make.exact("Plain", model["MODEL"], positive, empty, start, levels)]
    for method, way in zip(METHODS, ways, strict=True):
        latents.append(make.exact(method.capitalize(), way["model"], positive, way["negative"], start, levels))
    draw.column()
    images = [make.decode(latent, model) for latent in latents]
    draw.column()
    make.save("Autoencoder alone", round_trip, "invert_autoencoder")
    for method, image in zip(("plain", *METHODS), images, strict=True):
        make.save(f"Back: {method}", image, f"invert_{method.replace(' ', '_')}")
    draw.column()
    batch = images[0]
    for image in (*images[1:], round_trip):
        batch = draw.node("ImageBatch", image1=batch, image2=image)["IMAGE"]
    score = draw.node("LikenessScore", "Score", extra=420, images=batch, reference=picture)
    make.save("Scores", score["picture"], "invert_scores")


def edit(draw: Drawing) -> None:
    """A picture with its subject exchanged by a word."""
    make = Inverted(draw)
    draw.note(
        "# Exchange a subject by a word\nInverts a picture, and samples it twice at once: as it was, and with one word "
        "of its prompt exchanged, where everything but the new word looks at the places where it looked before "
        "for the first 40 % of the sampling (prompt-to-prompt, as HiFi Tuner uses it). Beside it the same swap without "
        "that control, which usually changes the whole picture.\n\n**First** change three places together. 1. Load "
        "your picture (it is cut to a 512 x 512 square) and describe it plainly in 'Prompt of the picture'. 2. In "
        "'Replace' write the word that goes (it must stand once in that prompt) and what takes its place. 3. In "
        "'Swapped prompt' write the same prompt with the new word.\n\n" + ADVICE + LEVELS + MODEL_NOTE,
        740,
    )
    model = make.model()
    draw.column()
    picture = make.subject("Picture to edit")
    text = make.text("Prompt of the picture", SOURCE)
    draw.column()
    positive = make.prompt("Prompt of the picture, encoded", model["CLIP"], text)
    empty = make.prompt("Empty prompt", model["CLIP"], "")
    swapped = make.prompt("Swapped prompt", model["CLIP"], SOURCE.replace(WORD, REPLACEMENT))
    levels = make.levels(model)
    draw.column()
    inverted = make.invert("Invert", model["MODEL"], picture, positive, model["VAE"], levels)
    way = make.back("Way back", model, positive, empty, inverted, DIRECT)
    draw.column()
    replaced = draw.node(
        "LikenessReplaceSubject",
        "Replace",
        model=way["model"],
        clip=model["CLIP"],
        latent=inverted["latent"],
        negative=way["negative"],
        prompt=text,
        word=WORD,
        replacement=REPLACEMENT,
        end_percent=UNTIL,
        blend=BLEND,
    )
    draw.column()
    both = make.exact("Both", replaced["model"], replaced["positive"], replaced["negative"], replaced["latent"], levels)
    plain = make.exact("Without control", model["MODEL"], swapped, way["negative"], inverted["latent"], levels)
    draw.column()
    make.save("Picture and edit", make.decode(both, model), "invert_edit")
    make.save("Edit without control", make.decode(plain, model), "invert_edit_plain")


GRAPHS: dict[str, Callable[[Drawing], None]] = {"invert_and_reconstruct": reconstruct, "invert_and_edit": edit}
