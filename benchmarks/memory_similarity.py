"""How much memory a likeness optimisation needs on the published models at 512 pixels: counted, without computing.

The networks are ComfyUI's own classes (and the pack's retrieval model) at their published widths, with tensors that
have shapes and no numbers. Counted is all that is alive at once, in one forward and backward pass for a gradient to the
input: weights, what autograd keeps, and temporary tensors. Attention is what the CPU computes; a GPU with one kernel
for it needs less for DINOv2, for which ComfyUI's CPU path keeps whole attention maps.

    python toolbox/_load.py benchmarks.memory_similarity --out benchmarks/results/memory_similarity.json
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..core.vision.instance_retrieval import Backbone, RetrievalNetwork
from . import frame
from .hosting import plain_attention

GB = 2**30
SHARED = {
    **{"image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "use_spatial_transformer": True},
    **{"legacy": False, "use_temporal_attention": False},
}
SD1 = {
    **SHARED,
    **{"num_res_blocks": [2] * 4, "channel_mult": [1, 2, 4, 4], "context_dim": 768, "num_heads": 8},
    **{"transformer_depth": [1] * 6 + [0] * 2, "transformer_depth_middle": 1, "adm_in_channels": None},
    "transformer_depth_output": [1] * 9 + [0] * 3,
}
SDXL = {
    **SHARED,
    **{"num_res_blocks": [2] * 3, "channel_mult": [1, 2, 4], "context_dim": 2048, "num_heads": -1},
    **{"num_head_channels": 64, "transformer_depth": [0, 0, 2, 2, 10, 10], "transformer_depth_middle": 10},
    **{"transformer_depth_output": [0] * 3 + [2] * 3 + [10] * 3, "use_linear_in_transformer": True},
    **{"adm_in_channels": 2816, "num_classes": "sequential"},
}
FLUX = {
    **{"in_channels": 16, "out_channels": 16, "vec_in_dim": 768, "context_in_dim": 4096, "hidden_size": 3072},
    **{"mlp_ratio": 4.0, "num_heads": 24, "depth": 19, "depth_single_blocks": 38, "axes_dim": [16, 56, 56]},
    **{"theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": False},
}
DECODER = {
    **{"double_z": True, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128, "ch_mult": [1, 2, 4, 4]},
    **{"num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0},
}
DINO = {
    **{"num_hidden_layers": 24, "hidden_size": 1024, "num_attention_heads": 16, "layer_norm_eps": 1e-6},
    "use_swiglu_ffn": False,
}


def unet(config: dict[str, Any]) -> tuple[Any, Callable[[], Any]]:
    """In float32, as the authors run it."""
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    net = UNetModel(**config, dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init)
    x, context = torch.randn(1, 4, 64, 64, requires_grad=True), torch.randn(1, 77, config["context_dim"])
    y = torch.randn(1, 2816) if config["adm_in_channels"] else None
    return net, lambda: net(x, torch.tensor([999.0]), context=context, y=y, transformer_options=plain_attention())


def flux() -> tuple[Any, Callable[[], Any]]:
    """In bfloat16, as the authors run it."""
    import comfy.ops
    from comfy.ldm.flux.model import Flux, FluxParams

    known = {"txt_ids_dims": []} if "txt_ids_dims" in FluxParams.__annotations__ else {}
    half = torch.bfloat16
    layers = {"device": "cpu", "operations": comfy.ops.disable_weight_init, "dtype": half}
    net = Flux(image_model="flux", **layers, **FLUX, **known)
    x = torch.randn(1, 16, 64, 64, requires_grad=True, dtype=half)
    rows, vector = torch.randn(1, 256, 4096, dtype=half), torch.randn(1, 768, dtype=half)
    return net, lambda: net(x, torch.ones(1, dtype=half), rows, vector, transformer_options=plain_attention())


def decoder() -> tuple[Any, Callable[[], Any]]:
    """The KL autoencoder's decoder, in float32."""
    from comfy.ldm.models.autoencoder import AutoencoderKL

    net = AutoencoderKL(ddconfig={**DECODER, "z_channels": 4}, embed_dim=4)
    z = torch.randn(1, 4, 64, 64, requires_grad=True)
    return net, lambda: net.decode(z)


def dino() -> tuple[Any, Callable[[], Any]]:
    """DINOv2 large, in float32."""
    import comfy.ops
    from comfy.image_encoders.dino2 import Dinov2Model

    net = Dinov2Model(DINO, torch.float32, torch.device("cpu"), comfy.ops.disable_weight_init)
    x = torch.randn(1, 3, 518, 518, requires_grad=True)
    return net, lambda: net(x)[2]


def retrieval() -> tuple[Any, Callable[[], Any]]:
    """The retrieval model, in float32."""
    net = RetrievalNetwork(Backbone(1280, 32, 16, 1024, 577), 64)
    x = torch.randn(1, 3, 290, 290, requires_grad=True)
    return net, lambda: net(x)


def figures() -> Iterator[tuple[str, dict[str, float]]]:
    """GB of each model: its weights, and all that is alive beside them, plain and with recomputation."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from ..core.session import checkpointing, weights

    parts: dict[str, tuple[Callable[[], tuple[Any, Callable[[], Any]]], Callable[[Any], Any]]] = {
        "SD1.x": (lambda: unet(SD1), checkpointing.checkpointed),
        "SDXL": (lambda: unet(SDXL), checkpointing.checkpointed),
        "FLUX.1": (flux, checkpointing.checkpointed),
        "decoder": (decoder, lambda net: checkpointing.checkpointed(net, checkpointing.DECODER)),
        "DINOv2 large": (dino, checkpointing.layers_checkpointed),
        "retrieval": (retrieval, checkpointing.layers_checkpointed),
    }
    for name, (make, recomputed) in parts.items():
        with FakeTensorMode(allow_non_fake_inputs=True):
            net, forward = make()
            net.requires_grad_(False)
            found = {"weights": sum(value.nbytes for value in net.parameters()) / GB}

            def there_and_back(forward: Callable[[], Any] = forward) -> None:
                forward().sum().backward()

            with weights.out_of_place(net):
                found["plain"] = frame.most_alive(there_and_back) / GB
                with recomputed(net):
                    found["checkpointed"] = frame.most_alive(there_and_back) / GB
        yield name, found


def main(arguments: list[str]) -> int:
    """Print the table."""
    run = frame.Run("memory_similarity", arguments, threads=1)
    return run.costs(run.table(figures()), {})
