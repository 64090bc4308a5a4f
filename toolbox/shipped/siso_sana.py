"""The shipped graph of SISO on Sana: twenty steps with guidance, of which the last three have a gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ..drawing import Drawing
from .pieces import HUB
from .siso import FIRST, HEAD, HOW, LIKENESS_ROWS, MANY_STEPS, Base, Likeness

FOLDER = "Sana_1600M_512px_diffusers"
# The recipe is the authors' own for Sana. Its samples are 32 times smaller than pictures, as HunyuanImage's are.
RECIPE = replace(MANY_STEPS, scheduler="simple", canvas="EmptyHunyuanImageLatent")
SANA_ROW = (
    f"| [{FOLDER}]({HUB}/Efficient-Large-Model/{FOLDER}) (with its sub-folders; of weights in several precisions one "
    f"each) | models/diffusers/{FOLDER} | NVIDIA NSCL v2-custom; its text encoder: Gemma Terms of Use |\n"
)


def sana(draw: Drawing) -> None:
    """The model of a diffusers folder, with stock samplers and our optimiser."""
    make = Likeness(draw)
    draw.note(
        "# A subject from one picture, with Sana (SISO)\n"
        + FIRST
        + HOW
        + "Sana is a model that ComfyUI does not know: 'Load Sana' makes its folder a MODEL, CLIP and VAE like any "
        "other. It needs a package: `pip install -U diffusers` with ComfyUI's Python (0.35 or newer; when pip "
        "complains, see the node's help page). The recipe is the authors': 20 steps, the last 3 of them with a "
        "gradient, cfg 4.5; checkpointing is on, which needs less memory and gives the same result. Stock Load LoRA "
        "(Model) and diffusers both read the saved LoRA.\n\n" + HEAD + SANA_ROW + LIKENESS_ROWS,
        1200,
    )
    node = draw.node("LikenessLoadSana", "Sana", name=FOLDER)
    base = Base(node["model"], node["clip"], node["vae"])
    draw.column()
    picture = make.picture("Picture of the subject")
    make.lora(base, picture, RECIPE, text_encoder=False, name="siso_sana")


GRAPHS: dict[str, Callable[[Drawing], None]] = {"siso_sana": sana}
