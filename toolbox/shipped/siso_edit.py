"""The shipped graphs of SISO's editing: another subject in a picture whose background stays, on turbo models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..drawing import Drawing, Node, Output
from .hifi import BLIP, DETECTOR, MASK_ROWS, SAM
from .pieces import HUB, SEED, SIZE
from .siso import HEAD, LIKENESS_ROWS, TURBO, Base, Likeness, row

SOURCE, WORD, RESULT = "a photo of a cat", "cat", "a photo of a dog"
STEPS, SKIPPED = 4, 1
SD_TURBO = {
    "name": "sd_turbo.safetensors",
    "url": f"{HUB}/stabilityai/sd-turbo/resolve/main/sd_turbo.safetensors",
    "directory": "checkpoints",
}
BLIP_ROW = f"""| [{BLIP}]({HUB}/Salesforce/{BLIP}) (all .json and .txt files, model.safetensors) \
| models/likeness_vision/{BLIP} | BSD-3-Clause |
"""
GROUPS_NOTE = """
The groups "Find the subject" and "Caption" are switched off, so that their models need not be there. To switch one \
on, right-click its title and choose "Set Group Nodes to Always". "Find the subject" finds the mask by the word in \
'What goes', beside what you painted; "Caption" describes both pictures, to be copied into the prompts in two or three \
words. Only "Find the subject" needs the detector, the SAM file and `pip install segment-anything` with ComfyUI's \
Python; painting needs none of them.
"""


HOW = (
    "Inverts a picture in three of four steps, and moves a small LoRA until what stands in it looks like your subject,"
    " while the background outside of the mask stays.\n\n**First** load both pictures (the picture to change is cut to"
    " a 512 x 512 square). 1. Right-click 'Picture to change', choose 'Open in MaskEditor' and paint what is to become"
    " your subject, with a little room around it. 2. In 'Prompt of the picture to change' write what stands there now,"
    " in two or three plain words ('a photo of a cat'); in 'Prompt of the result' what your subject is ('a photo of a "
    "dog'), nothing of its background.\n\nLook at 'Picture again' first: when it is already far from the picture, "
    "describe that better, or take another picture ('How near it comes': above about 30 % it is). The background "
    "changes: raise background_weight in 'Optimize' (30, 100). Too little of the subject: lower it (3), paint more "
    "room, or set 'step' in 'Without the first' to 0, which changes more. Colours and details are taken over more "
    "easily than another shape. It stops by itself, usually after 10 to 40 iterations; each takes about as long as a "
    "picture."
)


@dataclass(frozen=True)
class Inversion:
    """How the authors' code inverts with a model."""

    sampler: str
    correlation_weight: float


ANCESTRAL = Inversion("euler_ancestral", 20.0)
PLAIN = Inversion("euler", 0.0)


class Editing(Likeness):
    """A picture, its mask, its noise, and the edit that starts there."""

    def painted(self, picture: Node) -> Output:
        """The mask that was painted on the picture to change, cut as the picture is."""
        image = self.draw.node("MaskToImage", mask=picture["MASK"])["IMAGE"]
        scaled = self.draw.node(
            "ImageScale",
            "Mask to the model's size",
            image=image,
            upscale_method="nearest-exact",
            width=SIZE,
            height=SIZE,
            crop="center",
        )
        return self.draw.node("ImageToMask", image=scaled["IMAGE"], channel="red")["MASK"]

    def mask(self, painted: Output, image: Output) -> Output:
        """With what is found by its name, in a group that is switched off."""
        found = self.draw.node(
            "LikenessSubjectMask", "What goes", image=image, subject=WORD, detector=DETECTOR, sam=SAM
        )
        both = self.draw.node(
            "MaskComposite", "Painted or found", destination=painted, source=found["mask"], x=0, y=0, operation="or"
        )
        self.draw.group("Find the subject", [found, both], bypassed=True)
        return both["MASK"]

    def captions(self, pictures: dict[str, Output]) -> None:
        """What the pictures show, to be copied into the prompts."""
        nodes = []
        for title, image in pictures.items():
            captioned = self.draw.node("LikenessCaption", f"Describe {title}", image=image, model=BLIP)
            nodes += [
                captioned,
                self.draw.node("PreviewAny", f"What {title} shows", extra=100, source=captioned["caption"]),
            ]
        self.draw.group("Caption", nodes, bypassed=True)

    def levels_of_edit(self, model: Output) -> Output:
        """The last three of four steps."""
        whole = self.draw.node("BasicScheduler", "Steps", model=model, scheduler="simple", steps=STEPS)
        return self.draw.node("SplitSigmas", "Without the first", sigmas=whole["SIGMAS"], step=SKIPPED)["low_sigmas"]

    def again(self, base: Base, positive: Output, inverted: Node) -> None:
        """The picture as it comes back, by stock nodes."""
        draw = self.draw
        noise = draw.node("DisableNoise")["NOISE"]
        guider = draw.node("BasicGuider", model=base.model, conditioning=positive)["GUIDER"]
        sampled = draw.node(
            "SamplerCustomAdvanced",
            "Come back",
            extra=260,
            noise=noise,
            guider=guider,
            sampler=inverted["sampler"],
            sigmas=inverted["sigmas"],
            latent_image=inverted["latent"],
        )
        decoded = draw.node("VAEDecode", samples=sampled["output"], vae=base.vae)
        self.save("Picture again", decoded["IMAGE"], "siso_edit_inverted")
        draw.node("PreviewAny", "How near it comes", extra=100, source=inverted["report"])

    def edit(
        self, base: Base, similarity: Output, positive: Output, inverted: Node, image: Output, mask: Output
    ) -> None:
        """The optimisation, with the background's term."""
        node = self.draw.node(
            "LikenessOptimizeLora",
            "Optimize",
            extra=420,
            model=base.model,
            vae=base.vae,
            positive=positive,
            similarity=similarity,
            latent=inverted["latent"],
            sigmas=inverted["sigmas"],
            seed=SEED,
            iterations=50,
            learning_rate=3e-4,
            weight_decay=1e-2,
            cfg=1.0,
            grad_steps=1,
            patience=7,
            background_weight=10.0,
            checkpointing=True,
            image=image,
            mask=mask,
        )
        self.draw.column()
        self.save("Edited picture", node["best"], "siso_edit")
        self.draw.node("PreviewImage", "All iterations", images=node["images"])
        self.draw.node("LossGraphNode", "Loss", extra=260, loss=node["loss"], filename_prefix="likeness/loss")
        self.draw.node("PreviewAny", "Report", extra=160, source=node["report"])


def edited(draw: Drawing, model: dict[str, str], licence: str, inversion: Inversion, title: str, more: str) -> None:
    """The graph of one model."""
    make = Editing(draw)
    models = LIKENESS_ROWS.replace("\n\n", f"\n{MASK_ROWS}{BLIP_ROW}\n", 1) + GROUPS_NOTE
    head = f"# Your subject in another picture, with {title} (SISO)\n{HOW} {more}\n\n{HEAD}{row(model, licence)}"
    draw.note(head + models, 1180)
    base = make.checkpoint(model)
    draw.column()
    change = draw.node("LoadImage", "Picture to change", image="example.png")
    scaled = draw.node(
        "ImageScale",
        "To the model's size",
        image=change["IMAGE"],
        upscale_method="lanczos",
        width=SIZE,
        height=SIZE,
        crop="center",
    )
    image = scaled["IMAGE"]
    subject = make.picture("Picture of the subject")
    draw.column()
    painted = make.painted(change)
    mask = make.mask(painted, image)
    draw.column()
    make.captions({"the picture": image, "the subject": subject})
    source = make.prompt("Prompt of the picture to change", base.clip, SOURCE)
    result = make.prompt("Prompt of the result", base.clip, RESULT)
    levels = make.levels_of_edit(base.model)
    draw.column()
    inverted = draw.node(
        "LikenessRenoise",
        "Invert",
        model=base.model,
        positive=source,
        sigmas=levels,
        sampler=inversion.sampler,
        correlation_weight=inversion.correlation_weight,
        image=image,
        vae=base.vae,
    )
    similarity = make.likeness(subject)
    draw.column()
    make.again(base, source, inverted)
    draw.column()
    make.edit(base, similarity, result, inverted, image, mask)


def edit_sdxl_turbo(draw: Drawing) -> None:
    """As the authors' script."""
    edited(
        draw,
        TURBO,
        "Stability AI non-commercial research",
        ANCESTRAL,
        "SDXL-turbo",
        "'checkpointing' in 'Optimize' (among its advanced inputs) is on; with 24 GB it can be off, which is faster.",
    )


def edit_sd_turbo(draw: Drawing) -> None:
    """The paper's own model for editing."""
    edited(
        draw,
        SD_TURBO,
        "Stability AI non-commercial research",
        PLAIN,
        "SD-turbo",
        "SD-turbo is what the paper's own edits were made with: smaller and faster than SDXL-turbo, by steps without "
        "noise.",
    )


GRAPHS: dict[str, Callable[[Drawing], None]] = {
    "siso_edit_sdxl_turbo": edit_sdxl_turbo,
    "siso_edit_sd_turbo": edit_sd_turbo,
}
