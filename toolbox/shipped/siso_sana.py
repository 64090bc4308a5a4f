"""The shipped graph of SISO on Sana: twenty steps with guidance, of which the last three have a gradient."""

from __future__ import annotations

from collections.abc import Callable

from ..drawing import Drawing, Node, Output
from .pieces import HUB, SEED, SIZE, Pieces

FOLDER, DINO = "Sana_1600M_512px_diffusers", "dinov2-large"
STEPS, CFG, SCHEDULER = 20, 4.5, "simple"
# README of SISO, for Sana; the LoRA's layers (query, key, value) are the model's own choice.
RATE, DECAY, PATIENCE, GRAD_STEPS = 8e-4, 1e-4, 5, 3
PROMPT, EDIT = "a photo of a dog", "a photo of a dog on the beach, at sunset"


class Optimised(Pieces):
    """Pieces for a model whose parts come from one node of our own."""

    def drawn(self, title: str, sana: Node, model: Output, positive: Output, negative: Output, canvas: Output) -> None:
        """A picture of the last prompt."""
        latent = self.sample(
            title, model, positive, negative, canvas, steps=STEPS, cfg=CFG, sampler_name="euler", scheduler=SCHEDULER
        )
        image = self.draw.node("VAEDecode", samples=latent, vae=sana["vae"])["IMAGE"]
        name = "sana_" + title.lower().replace(" ", "_")
        self.draw.node("SaveImage", f"Picture {title.lower()}", images=image, filename_prefix=f"likeness/{name}")


NOTE = f"""# Optimize a LoRA of Sana (SISO)
Makes a picture of the plain prompt again and again, always from the same noise, and after each one moves a LoRA so \
that the next is more like your subject, as DINOv2 sees it. Sampled with the LoRA, other prompts show the subject too.

**First** load a picture of your subject (example.png only holds its place): square, with the subject large and in \
the middle. Write in 'Prompt' what it is, plainly: 'a photo of a dog', and in 'Edit prompt' where it should be.

It stops by itself when {PATIENCE} pictures have brought nothing new; the best one is kept. Cancel loses nothing: \
queued again it goes on, and with fewer iterations it gives what there is. More like the subject: learning_rate \
0.0012. Broken pictures: 0.0004. The LoRA is saved in models/loras/likeness; stock Load LoRA and diffusers read it.

Checkpointing, an advanced input of 'Learn the subject', is on: less memory, more time, the same result. When the card \
is too small all the same, the log says so before the first picture, and what to change.

## Models
| folder | where | licence |
|---|---|---|
| [{FOLDER}]({HUB}/Efficient-Large-Model/{FOLDER}) (the whole folder) | models/diffusers/{FOLDER} \
| NVIDIA NSCL v2-custom, Gemma Terms of Use |
| [{DINO}]({HUB}/facebook/{DINO}) (config.json, preprocessor_config.json, model.safetensors) \
| models/likeness_vision/{DINO} | Apache-2.0 |

Sana also needs a package: `pip install diffusers` with ComfyUI's Python.
"""


def sana(draw: Drawing) -> None:
    """Optimise on a plain prompt, then sample another one."""
    make = Optimised(draw)
    draw.note(NOTE, 900)
    model = draw.node("LikenessLoadSana", "Sana", name=FOLDER)
    dino = draw.node("LikenessLoadVision", "DINO (similarity)", name=DINO)
    draw.column()
    subject = draw.node("LoadImage", "Picture of the subject", image="example.png")["IMAGE"]
    text, edit = make.text("Prompt", PROMPT), make.text("Edit prompt", EDIT)
    draw.column()
    positive = make.prompt("Prompt, encoded", model["clip"], text)
    edited = make.prompt("Edit prompt, encoded", model["clip"], edit)
    negative = make.prompt("Negative prompt", model["clip"], "")
    canvas = draw.node("EmptyHunyuanImageLatent", "Size of the results", width=SIZE, height=SIZE)["LATENT"]
    levels = draw.node(
        "BasicScheduler", "Noise levels", model=model["model"], scheduler=SCHEDULER, steps=STEPS, denoise=1.0
    )["SIGMAS"]
    alike = draw.node("LikenessSimilarity", "Like the subject", vision=dino["vision"], image=subject)["similarity"]
    draw.column()
    learned = draw.node(
        "LikenessOptimizeLora",
        "Learn the subject",
        extra=420,
        model=model["model"],
        vae=model["vae"],
        positive=positive,
        negative=negative,
        similarity=alike,
        latent=canvas,
        sigmas=levels,
        learning_rate=RATE,
        weight_decay=DECAY,
        patience=PATIENCE,
        cfg=CFG,
        grad_steps=GRAD_STEPS,
        checkpointing=True,
        seed=SEED,
    )
    draw.column()
    draw.node("LossGraphNode", "Loss curve", extra=260, loss=learned["loss"], filename_prefix="likeness/loss")
    draw.node("LikenessSaveTuned", "Save the LoRA", lora=learned["lora"])
    draw.node("PreviewAny", "Report", source=learned["report"])
    draw.node("PreviewImage", "Best picture", images=learned["best"])
    draw.node("PreviewImage", "All pictures", images=learned["images"])
    draw.column()
    make.drawn("Without the LoRA", model, model["model"], edited, negative, canvas)
    draw.column()
    make.drawn("With the LoRA", model, learned["model"], edited, negative, canvas)


GRAPHS: dict[str, Callable[[Drawing], None]] = {"siso_sana": sana}
