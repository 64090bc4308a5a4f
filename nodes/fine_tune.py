"""Fine-tune a model on one image (SINE; DreamBooth-style without patches)."""

from __future__ import annotations

from comfy_api.latest import io

from ..core.session.outputs import loss_map, nothing
from ..core.sine import fine_tune as sine
from ..core.sine.host.crops import CropSettings
from ..core.sine.host.fine_tune import FULL, LORA, PROMPT, FineTuneData, FineTunePlan, PriorImages, fine_tune
from ..core.sine.position_map import INTERPOLATIONS, MAX_CELLS
from .types import LoraModel, LossMap, advanced, schema, seed_input


class LikenessFineTune(io.ComfyNode):
    """MODEL + VAE + image + prompt -> the same model, over-fitted to the image."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LikenessFineTune",
            display_name="Fine-Tune On Image (SINE)",
            category="likeness/fine_tune",
            description="Teaches a model one image under one fixed prompt, whole or in patches with a position map "
            "(SINE), so that Subject Guidance can edit that image. As a LoRA or as a fine-tune of all weights.",
            search_aliases=["sine", "dreambooth", "train lora", "finetune", "single image"],
            inputs=[
                io.Model.Input("model", tooltip="The model to teach. It is not changed."),
                io.Vae.Input("vae", tooltip="The model's own VAE."),
                io.Image.Input(
                    "image",
                    tooltip="The image to learn, at any size and shape: it is squashed to a square. Several images "
                    "of one subject may come as a batch; then patches are best off.",
                ),
                io.String.Input(
                    "prompt",
                    default=PROMPT,
                    multiline=True,
                    tooltip="The training prompt: a rare word and the subject's class. It is stored with the weights "
                    "and must be used, word for word, with the tuned model. With 'positive' connected, write the text "
                    "behind it here.",
                ),
                io.Combo.Input(
                    "method",
                    options=[LORA, FULL],
                    default=LORA,
                    tooltip="LoRA trains small factors beside the attention layers. 'full weights' is the paper's: "
                    "learning rate 0.000001, 10000 steps with patches, 800 without; needs 16 bytes of VRAM for every "
                    "weight.",
                ),
                io.Boolean.Input(
                    "patches",
                    default=True,
                    tooltip="Learn from random patches with a position map: the tuned model can then draw the image "
                    "at any size and shape. Off: the whole image at the training size (400 to 800 steps).",
                ),
                io.Int.Input(
                    "steps",
                    default=1000,
                    min=1,
                    max=1_000_000,
                    tooltip="Number of updates. Asking for more later goes on where this run ended. Asking for fewer "
                    "gives that step of a LoRA when it was kept (every 500), else the longer run with a warning; full "
                    "weights are trained anew.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=sine.LEARNING_RATE,
                    min=1e-8,
                    max=1.0,
                    step=1e-6,
                    round=1e-9,
                    tooltip="AdamW's learning rate: 0.0001 for a LoRA. Set it to 0.000001, the paper's, when you "
                    "choose full weights: the default is 100 times that.",
                ),
                io.Int.Input(
                    "rank",
                    default=16,
                    min=1,
                    max=512,
                    tooltip="Rank of the LoRA: more can hold more of the image. Not used by full weights.",
                ),
                io.Int.Input(
                    "resolution",
                    default=512,
                    min=64,
                    max=4096,
                    step=8,
                    tooltip="Side of one training square in pixels: 512 for SD1.x, 768 for SD2.x, 1024 for SDXL.",
                ),
                seed_input(
                    "Decides patches, timesteps, noise and the LoRA's start. The same seed gives the same "
                    "bytes on a CPU; on a GPU up to rounding."
                ),
                *_advanced(),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="Connect it to train the text encoder too, as the paper does. Instead of 'positive'.",
                ),
                io.Conditioning.Input(
                    "positive",
                    optional=True,
                    tooltip="The training prompt, encoded; the text encoder stays as it is. Instead of 'clip'. Its "
                    "text must stand in 'prompt' too, word for word: that is what Load Fine-Tune encodes.",
                ),
                io.Mask.Input(
                    "mask", optional=True, tooltip="White where the subject is: the rest of the image is not learned."
                ),
                io.Image.Input(
                    "prior_image",
                    optional=True,
                    tooltip="Images of the subject's class, for prior_weight.",
                ),
                io.Conditioning.Input(
                    "prior_positive",
                    optional=True,
                    tooltip="The class's prompt, encoded, when no 'clip' is connected.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model", tooltip="The tuned model, with its position map when patches were used."
                ),
                io.Clip.Output(
                    display_name="clip", tooltip="The tuned text encoder. Nothing runs behind it without 'clip'."
                ),
                LoraModel.Output(
                    display_name="lora", tooltip="What was learned, for Save Fine-Tune and the stock LoRA nodes."
                ),
                LossMap.Output(display_name="loss", tooltip="The loss of every step, for Plot Loss Graph."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model,
        vae,
        image,
        prompt,
        method,
        patches,
        steps,
        learning_rate,
        rank,
        resolution,
        seed,
        whole_image,
        recon_weight,
        cells,
        interpolation,
        crops,
        prior_weight,
        prior_prompt,
        checkpointing,
        clip=None,
        positive=None,
        mask=None,
        prior_image=None,
        prior_positive=None,
    ) -> io.NodeOutput:
        grid = cells or 2 * resolution // vae.spacial_compression_encode()
        crop = CropSettings(resolution, grid, crops, whole_image) if patches else CropSettings(resolution)
        tuned, tuned_clip, lora, losses = fine_tune(
            model,
            vae,
            FineTuneData(image, prompt, mask, clip, positive),
            FineTunePlan(crop, method, steps, rank, interpolation, checkpointing),
            sine.FineTuneSettings(learning_rate, seed, recon_weight, prior_weight),
            None if prior_image is None else PriorImages(prior_image, prior_prompt, prior_positive),
            node_id=cls.hidden.unique_id,
        )
        return io.NodeOutput(tuned, nothing() if tuned_clip is None else tuned_clip, lora, loss_map(losses))


def _advanced() -> list[io.Input]:
    """The inputs for experiments."""
    inputs = [
        io.Float.Input(
            "whole_image",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.05,
            tooltip="Probability of the whole image instead of a patch: 0 in the authors' code, 0.1 in their "
            "diffusers script.",
        ),
        io.Float.Input(
            "recon_weight",
            default=sine.RECON_WEIGHT,
            min=0.0,
            max=100.0,
            step=0.1,
            tooltip="Weight of the second term of the patch loss, which pushes on the layout at high noise: 1 in the "
            "authors' code, 0 in the paper. Not used without patches.",
        ),
        io.Int.Input(
            "cells",
            default=0,
            min=0,
            max=MAX_CELLS,
            tooltip="Cells per side of the position map's grid; 0 is twice the training square (128 for 512 pixels).",
        ),
        io.Combo.Input(
            "interpolation",
            options=list(INTERPOLATIONS),
            default=INTERPOLATIONS[0],
            tooltip="How the map is stretched: bilinear for photographs, nearest for paintings in the authors' "
            "configurations.",
        ),
        io.Int.Input(
            "crops",
            default=1000,
            min=1,
            max=100_000,
            tooltip="Patches encoded before training; they repeat after so many steps.",
        ),
        io.Float.Input(
            "prior_weight",
            default=0.0,
            min=0.0,
            max=10.0,
            step=0.1,
            tooltip="Weight of the loss on other images of the class (DreamBooth's prior preservation). The paper "
            "found more artifacts with it; 0 switches it off.",
        ),
        io.String.Input(
            "prior_prompt",
            default="",
            tooltip="The class's prompt, such as 'photo of a dog', when 'clip' is connected.",
        ),
        io.Boolean.Input(
            "checkpointing",
            default=False,
            tooltip="Compute parts of the network twice instead of keeping them: less VRAM, more time, the same "
            "result.",
        ),
    ]
    return advanced(*inputs)


NODES = [LikenessFineTune]
