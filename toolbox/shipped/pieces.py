"""What the descriptions of the shipped graphs share: models, notes, and pieces of several nodes."""

from __future__ import annotations

from typing import Any

from ..drawing import Drawing, Node, Output

CHECKPOINT = "v1-5-pruned-emaonly-fp16.safetensors"
DINO, CLIP = "dinov2-base", "clip-vit-large-patch14"
HUB = "https://huggingface.co"
CHECKPOINT_MODEL = {
    "name": CHECKPOINT,
    "url": f"{HUB}/Comfy-Org/stable-diffusion-v1-5-archive/resolve/main/{CHECKPOINT}",
    "directory": "checkpoints",
}
SIZE, SEED, SAMPLING_STEPS, CFG = 512, 42, 30, 7.5

MODEL_NOTE = f"""## Models
| file | folder | licence |
|---|---|---|
| [{CHECKPOINT}]({CHECKPOINT_MODEL["url"]}) | models/checkpoints | CreativeML Open RAIL-M |
"""
VISION_NOTE = f"""| [{DINO}]({HUB}/facebook/dinov2-base) (config.json, preprocessor_config.json, model.safetensors) \
| models/likeness_vision/{DINO} | Apache-2.0 |
| [{CLIP}]({HUB}/openai/clip-vit-large-patch14) (all .json and .txt files, model.safetensors) \
| models/likeness_vision/{CLIP} | MIT |

'{DINO}' and '{CLIP}' are only for the scores.
"""
OFF_NOTE = """The group "Scores" is therefore switched off. When you have them, right-click its title and choose
"Set Group Nodes to Always".
"""
ON_NOTE = """Without them, right-click the title of the group "Scores" and choose "Bypass Group Nodes" before you run;
the pictures of all steps are made as usual.
"""


class Pieces:
    """What all graphs have in common."""

    def __init__(self, drawing: Drawing) -> None:
        self.draw = drawing

    def model(self) -> Node:
        return self.draw.node("CheckpointLoaderSimple", "Model", models=(CHECKPOINT_MODEL,), ckpt_name=CHECKPOINT)

    def subject(self, title: str = "Picture of the subject") -> Output:
        """A picture, cut to the model's size."""
        loaded = self.draw.node("LoadImage", title, image="example.png")
        scaled = self.draw.node(
            "ImageScale",
            "To the model's size",
            image=loaded["IMAGE"],
            upscale_method="lanczos",
            width=SIZE,
            height=SIZE,
            crop="center",
        )
        return scaled["IMAGE"]

    def prompt(self, title: str, clip: Output, text: str | Output) -> Output:
        return self.draw.node("CLIPTextEncode", title, clip=clip, text=text)["CONDITIONING"]

    def canvas(self, width: int = SIZE, height: int = SIZE) -> Output:
        return self.draw.node("EmptyLatentImage", "Size of the results", width=width, height=height)["LATENT"]

    def sample(
        self,
        title: str,
        model: Output,
        positive: Output,
        negative: Output,
        canvas: Output,
        **changes: int | float | str,
    ) -> Output:
        """All samplings share one seed, so that results differ by one thing only."""
        settings: dict[str, Any] = {
            "steps": SAMPLING_STEPS,
            "cfg": CFG,
            "sampler_name": "euler",
            "scheduler": "normal",
            **changes,
        }
        node = self.draw.node(
            "KSampler",
            title,
            extra=260,
            model=model,
            seed=SEED,
            positive=positive,
            negative=negative,
            latent_image=canvas,
            denoise=1.0,
            **settings,
        )
        return node["LATENT"]

    def decode(self, latent: Output, model: Node) -> Output:
        return self.draw.node("VAEDecode", samples=latent, vae=model["VAE"])["IMAGE"]

    def vision(self) -> tuple[Node, Node]:
        return (
            self.draw.node("LikenessLoadVision", "DINO (identity)", name=DINO),
            self.draw.node("LikenessLoadVision", "CLIP (prompt)", name=CLIP),
        )

    def text(self, title: str, value: str) -> Output:
        """A prompt that is used in more than one place."""
        return self.draw.node("PrimitiveStringMultiline", title, value=value)["STRING"]


def score_node(draw: Drawing, images: Output, reference: Output, text: Output, dino: Node, clip: Node) -> Node:
    """Identity against the subject's picture, and how well the prompt is met."""
    return draw.node(
        "LikenessScore",
        "Score",
        extra=420,
        images=images,
        reference=reference,
        prompt=text,
        dino=dino["vision"],
        clip=clip["vision"],
    )
