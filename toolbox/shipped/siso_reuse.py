"""The shipped graph that uses SISO's saved LoRA again, by stock nodes alone."""

from __future__ import annotations

from collections.abc import Callable

from ..drawing import Drawing
from .pieces import CHECKPOINT_MODEL, MODEL_NOTE
from .siso import Likeness

SAVED = "likeness/siso_sd15_00001_.safetensors"


def reuse(draw: Drawing) -> None:
    """The saved LoRA through ComfyUI's own loader, in three prompts."""
    make = Likeness(draw)
    draw.note(
        "# Use a learned subject again (SISO)\nThe saved LoRA in other prompts, with the stock LoRA loader: no node of "
        "this pack is needed.\n\n**First** run 'siso_generate' once, choose its file in 'Saved LoRA' (press R if the "
        "list does not show it), and name the subject by its class in the prompts, as in the training. Lower the "
        "strength to 0.7 when the background of the training comes back; other LoRAs can be loaded beside it. Keep the "
        "seed of the training in the samplers: from other noise less of the subject is left.\n\nFiles of the other "
        "graphs need their own model and settings. SDXL-turbo: its checkpoint, steps 4, cfg 1, euler_ancestral, "
        "sgm_uniform. FLUX.1-schnell: the three loaders of 'siso_flux' in the "
        "place of 'Model', steps 4, cfg 1, euler, simple.\n\n" + MODEL_NOTE,
        640,
    )
    base = make.checkpoint(CHECKPOINT_MODEL)
    draw.column()
    loaded = draw.node(
        "LoraLoader",
        "Saved LoRA",
        model=base.model,
        clip=base.clip,
        lora_name=SAVED,
        strength_model=1.0,
        strength_clip=1.0,
    )
    negative = make.prompt("Negative prompt", loaded["CLIP"], "")
    canvas = make.canvas()
    draw.column()
    places = ("a photo of a dog on a sandy beach", "a photo of a dog at night", "a photo of a dog in front of a wall")
    prompts = [make.prompt(f"Prompt {index}", loaded["CLIP"], text) for index, text in enumerate(places, 1)]
    draw.column()
    latents = [
        make.sample(f"Sample {index}", loaded["MODEL"], prompt, negative, canvas)
        for index, prompt in enumerate(prompts, 1)
    ]
    draw.column()
    images = [draw.node("VAEDecode", samples=latent, vae=base.vae)["IMAGE"] for latent in latents]
    draw.column()
    for index, image in enumerate(images, 1):
        make.save(f"Result {index}", image, f"siso_reuse_{index}")


GRAPHS: dict[str, Callable[[Drawing], None]] = {"siso_reuse": reuse}
