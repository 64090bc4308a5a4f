"""Fine-tune a model on one image (SINE; DreamBooth-style without patches)."""

from comfy_api.latest import io

from ..core.sine import fine_tune as sine
from ..core.sine.host.crops import CropSettings
from ..core.sine.host.fine_tune import FORMS, FULL, LORA, PROMPT, FineTuneData, FineTunePlan, fine_tune
from ..core.sine.position_map import INTERPOLATIONS, MAX_CELLS
from . import inputs
from .node import LoraModel, LossMap, Node, build, output, schema


class LikenessFineTune(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LikenessFineTune",
            display_name="Fine-Tune On Image (SINE)",
            category="likeness/fine_tune",
            description="Fine-tunes a model on one image with one fixed prompt, on the whole image or on patches with "
            "a position map (SINE), so that Subject Guidance can edit the image. Trains a LoRA or all weights.",
            search_aliases=["sine", "dreambooth", "train lora", "finetune", "single image"],
            inputs=[
                io.Model.Input("model", tooltip="The model to fine-tune. It is not changed."),
                io.Vae.Input("vae", tooltip="The model's own VAE."),
                io.Image.Input(
                    "image",
                    tooltip="The training image, of any size and shape; it is squashed to a square. For a batch of "
                    "images of one subject, turn patches off.",
                ),
                io.String.Input(
                    "prompt",
                    default=PROMPT,
                    multiline=True,
                    tooltip="The training prompt: a rare word and the subject's class. It is stored with the weights "
                    "and must be used verbatim with the fine-tuned model. If 'positive' is connected, enter the text "
                    "it was encoded from.",
                ),
                inputs.choice(
                    "method",
                    [LORA, FULL],
                    "LoRA trains low-rank factors of the attention layers. 'full weights' is the paper's method: "
                    "learning rate 0.000001, 10000 steps with patches, 800 without; it needs 16 bytes of VRAM per "
                    "weight.",
                ),
                io.Boolean.Input(
                    "patches",
                    default=True,
                    tooltip="Trains on random patches with a position map, so that the fine-tuned model can draw the "
                    "image at any size and shape. Off, or on a model that cannot have a map: trains on the whole image "
                    "at the training size (400 to 800 steps).",
                ),
                inputs.count(
                    "steps",
                    1000,
                    1_000_000,
                    "Number of updates. Raise it later to resume the run. A lower value returns that step of a LoRA if "
                    "it was saved (every 500), else the longer run with a warning; full weights are trained again.",
                ),
                inputs.number(
                    "learning_rate",
                    sine.LEARNING_RATE,
                    (1e-9, 1.0, 1e-6, 1e-9),
                    "AdamW's learning rate: 0.0001 for a LoRA. For full weights set the paper's 0.000001; the default "
                    "is 100 times higher.",
                ),
                inputs.count(
                    "rank",
                    16,
                    512,
                    "Rank of the LoRA. A higher rank can hold more of the image. Not used with full weights.",
                ),
                inputs.number(
                    "resolution",
                    512,
                    (64, 4096, 8),
                    "Side of the training square in pixels: 512 for SD1.x, 768 for SD2.x, 1024 for SDXL.",
                ),
                inputs.seed(
                    "Seed of the patches, timesteps, noise and LoRA initialization. The same seed gives bit-identical "
                    "results on a CPU; on a GPU, up to rounding."
                ),
                *_advanced(),
            ],
            optional=[
                io.Clip.Input(
                    "clip", tooltip="Connect it to train the text encoder too, as in the paper. Use this or 'positive'."
                ),
                io.Conditioning.Input(
                    "positive",
                    tooltip="The encoded training prompt; the text encoder is not trained. Use this or 'clip'. "
                    "'prompt' must contain the same text verbatim, since Load Fine-Tune encodes it.",
                ),
                io.Mask.Input("mask", tooltip="White on the subject. The rest of the image is not learned."),
                io.Image.Input("prior_image", tooltip="Images of the subject's class, for prior_weight."),
                io.Conditioning.Input("prior_positive", tooltip="The encoded class prompt, if no 'clip' is connected."),
                *inputs.advanced(
                    inputs.layers("those of the attention"),
                    inputs.choice(
                        "lora_type",
                        FORMS,
                        "T-LoRA uses half of the ranks at high noise and all at low noise, so that a single image is "
                        "over-fitted less. LoKr is a product of two small matrices: 'rank' is then the size of the "
                        "first, and a higher one makes a smaller file. Not used with full weights.",
                    ),
                ),
            ],
            outputs=[
                output(io.Model, "model", "The fine-tuned model, with its position map if patches were used."),
                output(io.Clip, "clip", "The fine-tuned text encoder. Nodes connected here do not run without 'clip'."),
                output(LoraModel, "lora", "The trained weights, for Save Fine-Tune and the stock LoRA nodes."),
                output(LossMap, "loss", "The loss of every step, for Plot Loss Graph."),
            ],
        )

    @classmethod
    def execute(
        cls, model, vae, patches, resolution, whole_image, cells, crops, prior_prompt, prior_image=None, **more
    ) -> io.NodeOutput:
        grid = cells or 2 * resolution // vae.spacial_compression_encode()
        crop = CropSettings(resolution, grid, crops, whole_image) if patches else CropSettings(resolution)
        kinds = FineTuneData, FineTunePlan, sine.FineTuneSettings
        of_class, form = more.pop("prior_positive", None), more.pop("lora_type", LORA)
        data, plan, settings = build({**more, "crop": crop, "form": form}, *kinds)
        prior = None if prior_image is None else FineTuneData(prior_image, prior_prompt, positive=of_class)
        return io.NodeOutput(*fine_tune(model, vae, data, plan, settings, prior))


def _advanced() -> list[io.Input]:
    return inputs.advanced(
        inputs.number(
            "whole_image",
            0.0,
            (0.0, 1.0, 0.05),
            "Probability of training on the whole image instead of a patch: 0 in the reference code, 0.1 in its "
            "diffusers script.",
        ),
        inputs.number(
            "recon_weight",
            sine.RECON_WEIGHT,
            (0.0, 100.0, 0.1),
            "Weight of the second term of the patch loss, which emphasizes the layout at high noise: 1 in the "
            "reference code, 0 in the paper. Not used without patches.",
        ),
        inputs.number(
            "cells",
            0,
            (0, MAX_CELLS),
            "Cells per side of the position map's grid. 0 is twice the training square (128 for 512 pixels).",
        ),
        inputs.choice(
            "interpolation",
            INTERPOLATIONS,
            "Interpolation of the position map. The reference code uses bilinear for photographs and nearest for "
            "paintings.",
        ),
        inputs.count(
            "crops", 1000, 100_000, "Number of patches encoded before training. They repeat after that many steps."
        ),
        inputs.number(
            "prior_weight",
            0.0,
            (0.0, 10.0, 0.1),
            "Weight of the loss on other images of the class (DreamBooth's prior preservation). 0 turns it "
            "off; the paper found more artifacts with it.",
        ),
        io.String.Input(
            "prior_prompt", default="", tooltip="The class prompt, such as 'photo of a dog', if 'clip' is connected."
        ),
        inputs.checkpointing(),
    )
