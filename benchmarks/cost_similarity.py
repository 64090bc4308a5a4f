"""What one iteration of a likeness optimisation costs: memory beside the plain graph, and time beside the bare modules.

Plain: the images' whole graph with all features in it, no checkpointing, one backward. Ours: one feature after the
other, and everything computed again in the backward pass. Peak: the models' weights and the most that torch's allocator
held beside them in an iteration, so with what autograd keeps, what a recomputation needs, and every temporary tensor.
Both give the same gradient.

Bare: the same forward passes, backward passes, recomputations and Adam step on the same modules, without ComfyUI's
sampler and guider around them.

The models are ComfyUI's own classes with the published layouts (SD1.x's UNet and autoencoder, DINOv2 at 518 pixels, the
retrieval model at 290), at a quarter of their width, and with random weights: neither figure depends on those.

    python toolbox/_load.py benchmarks.cost_similarity --out benchmarks/results/cost_similarity.json
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ..core.siso.siso import MAX_NORM, SisoSettings
from ..core.vision.instance_retrieval import Backbone, RetrievalNetwork
from . import frame, hosting
from .frame import by_turns

LATENT = (1, 4, 32, 32)
TIME_GATE, MEMORY_GATE, GRADIENT_GATE = 1.15, 0.6, 1e-4
UNET: dict[str, Any] = {
    **{"image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 96, "num_res_blocks": [2, 2, 2, 2]},
    **{"channel_mult": [1, 2, 4, 4], "use_spatial_transformer": True, "context_dim": 768, "num_heads": 8},
    **{"transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_middle": 1, "legacy": False},
    **{"transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], "use_linear_in_transformer": False},
    **{"use_temporal_attention": False, "adm_in_channels": None},
}
DECODER: dict[str, Any] = {
    **{"double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 32},
    **{"ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0},
}
DINO_WIDTH, DINO_LAYERS, RETRIEVAL_WIDTH, RETRIEVAL_LAYERS = 256, 24, 320, 32


@dataclass(frozen=True)
class Settings:
    """How often an iteration is timed."""

    rounds: int = 5


def randomise(module: Any) -> Any:
    """Small random weights; ComfyUI's layers start as uninitialised memory."""
    generator = torch.Generator().manual_seed(0)
    for value in module.parameters():
        with torch.no_grad():
            spread = 0.5 / value[0].numel() ** 0.5 if value.ndim > 1 else 0.0
            value.copy_(torch.randn(value.shape, generator=generator) * spread + (value.ndim < 2))
    return module


def models() -> tuple[Any, Any, list[Any]]:
    """MODEL, VAE, and the two CLIP_VISIONs."""
    import comfy.model_base
    import comfy.model_patcher
    import comfy.sd
    import comfy.supported_models

    cpu = torch.device("cpu")
    with torch.inference_mode():
        config = comfy.supported_models.SD15({**UNET, "dtype": torch.float32})
        base = comfy.model_base.BaseModel(config, model_type=comfy.model_base.ModelType.EPS, device="cpu")
        randomise(base.diffusion_model)
        model = comfy.model_patcher.ModelPatcher(base, cpu, cpu)
        from comfy.ldm.models.autoencoder import AutoencoderKL

        layout = {"params": {"ddconfig": DECODER, "embed_dim": 4}}
        vae = comfy.sd.VAE(sd=randomise(AutoencoderKL(**layout["params"])).state_dict(), config=layout)
        return model, vae, [dino(), retrieval()]


def dino(layers: int = DINO_LAYERS, width: int = DINO_WIDTH) -> Any:
    """ComfyUI's own DINOv2, as a CLIP_VISION."""
    import comfy.clip_vision
    import comfy.model_patcher
    import comfy.ops
    from comfy.image_encoders.dino2 import Dinov2Model

    config = {
        **{"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 4, "image_size": 518},
        **{
            "patch_size": 14,
            "num_channels": 3,
            "layer_norm_eps": 1e-6,
            "use_swiglu_ffn": False,
            "model_type": "dinov2",
        },
        **{"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]},
    }
    file = Path(hosting.tempfile.mkdtemp()) / "dino.json"
    file.write_text(json.dumps(config))
    vision = comfy.clip_vision.ClipVisionModel(str(file))
    cpu = torch.device("cpu")
    vision.model = randomise(Dinov2Model(config, torch.float32, cpu, comfy.ops.disable_weight_init))
    vision.patcher = comfy.model_patcher.ModelPatcher(vision.model, vision.load_device, cpu)
    vision.dtype = torch.float32
    return vision


def retrieval() -> Any:
    """The retrieval model."""
    from ..core.vision.host.extras.retrieval import RetrievalTower
    from ..core.vision.host.vision import VisionModel

    tower = RetrievalNetwork(Backbone(RETRIEVAL_WIDTH, RETRIEVAL_LAYERS, 4, 1024, 577), 64)
    return VisionModel(RetrievalTower(randomise(tower).train(False).requires_grad_(False), "retrieval"))


def peak(run: Callable[[], object]) -> int:
    """The most bytes that torch's allocator held while run() went, beside what it held before."""
    with peak_within() as most:
        run()
    return most()


@contextlib.contextmanager
def peak_within() -> Iterator[Callable[[], int]]:
    """The same of the block: a function that tells it afterwards."""

    def most() -> int:
        held = top = 0
        for _, change in sorted(changes):
            held += change
            top = max(top, held)
        return top

    changes: list[tuple[int, int]] = []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
        yield most
    changes += [
        (event.start_ns(), event.nbytes())
        for event in profiled.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]


def gradient(fit: Any) -> Any:
    """All gradients of the last backward, clipped as the optimisation does, in one vector."""
    torch.nn.utils.clip_grad_norm_(fit.parameters.values(), MAX_NORM)
    return torch.cat([parameter.grad.flatten() for parameter in fit.parameters.values()]).clone()


def in_session(parts: tuple[Any, Any, list[Any]], checkpointing: bool, measure: Callable[[Any], None]) -> None:
    """Give measure() the optimisation in progress, inside the pack's own session."""
    from ..core.siso.host import optimize_lora as host
    from ..core.siso.host.similarity import Similarity, similarity_part

    model, vae, visions = parts
    generator = torch.Generator().manual_seed(0)
    prompt = [[torch.randn(1, 77, 768, generator=generator), {}]]
    image = torch.rand(1, 256, 256, 3, generator=generator)
    levels = torch.tensor([float(model.get_model_object("model_sampling").sigma_max), 0.0])
    with frame.measured_training(measure):
        job = host.SisoJob(
            host.Generator(model, vae, prompt),
            Similarity(tuple(similarity_part(vision, 1.0, image) for vision in visions)),
            host.Sampling(torch.zeros(LATENT), levels, 0),
            host.SisoPlan(checkpointing=checkpointing),
            SisoSettings(),
        )
        host.optimize_lora(job)


def bare(parts: tuple[Any, Any, list[Any]], fit: Any) -> Callable[[], None]:
    """An iteration on the modules alone; the session's hooks on them (LoRA, recomputation) work here too."""
    from ..core.vision.host.vision import published_preprocess

    model, vae, visions = parts
    unet, decoder = model.model.diffusion_model, vae.first_stage_model
    sampling = model.get_model_object("model_sampling")
    options, generator = hosting.plain_attention(), torch.Generator().manual_seed(0)
    context = torch.randn(1, 77, 768, generator=generator)
    noise, sigma = torch.randn(LATENT, generator=generator), float(sampling.sigma_max)
    x = noise * (sigma**2 + 1) ** 0.5
    adam = torch.optim.AdamW(fit.parameters.values())
    images = torch.rand(1, 256, 256, 3, generator=generator)
    prepare = [published_preprocess(vision) for vision in visions]

    def seen(vision: Any, pixels: Any) -> Any:
        return vision.model.model(pixels) if hasattr(vision.model, "preprocess") else vision.model(pixels)[2]

    with torch.no_grad():
        wanted = [seen(vision, how(images)) for vision, how in zip(visions, prepare, strict=True)]

    def step() -> None:
        eps = unet(x / (sigma**2 + 1) ** 0.5, torch.tensor([999.0]), context=context, transformer_options=options)
        image = ((decoder.decode((x - sigma * eps) / 0.18215) + 1) / 2).clamp(0, 1)
        pixels = image.detach().requires_grad_(True)
        for vision, how, target in zip(visions, prepare, wanted, strict=True):
            (-F.cosine_similarity(seen(vision, how(pixels.movedim(1, -1))), target).mean()).backward()
        adam.zero_grad(set_to_none=True)
        image.backward(pixels.grad)
        torch.nn.utils.clip_grad_norm_(fit.parameters.values(), 1.0)
        adam.step()

    return step


def figures(parts: tuple[Any, Any, list[Any]], rounds: int) -> dict[str, Any]:
    """Peaks with their ratios, how far the gradients are apart, and the times."""
    found: dict[str, Any] = {}
    gradients = {}

    def plain(fit: Any) -> None:
        def whole() -> None:
            image = fit.generate()
            sum(term(image) for term in fit.terms).backward()

        whole()
        fit.optimizer.zero_grad(set_to_none=True)
        found["plain"] = peak(whole)
        gradients["plain"] = gradient(fit)

    def apart(fit: Any) -> None:
        fit.update()
        fit.optimizer.zero_grad(set_to_none=True)
        found["features apart"] = peak(fit.update)

    def ours(fit: Any) -> None:
        fit.update()
        gradients["ours"] = gradient(fit)
        fit.optimizer.zero_grad(set_to_none=True)
        found["ours"] = peak(fit.update)
        found["time"] = by_turns(fit.update, bare(parts, fit), rounds)

    in_session(parts, False, plain)
    in_session(parts, False, apart)
    in_session(parts, True, ours)
    model, vae, visions = parts
    held = frame.weights(model.model.diffusion_model, vae.first_stage_model, *(vision.model for vision in visions))
    peaks = {name: held + found[name] for name in ("plain", "features apart", "ours")}
    return {
        "weights": held,
        **{f"peak, {name}": value for name, value in peaks.items()},
        "memory ratio": peaks["ours"] / peaks["plain"],
        "memory ratio, features apart": peaks["features apart"] / peaks["plain"],
        "gradient difference": float((gradients["ours"] - gradients["plain"]).norm() / gradients["plain"].norm()),
        "seconds": found["time"],
        "time ratio": found["time"]["ratio"],
    }


def main(arguments: list[str]) -> int:
    """Print the figures; exit 1 when a gate is missed."""
    run = frame.Run("cost_similarity", arguments, Settings())
    found = figures(models(), run.settings.rounds)
    for name, value in found.items():
        frame.say(f"{name}: {value}")
    gates = {"memory ratio": MEMORY_GATE, "time ratio": TIME_GATE, "gradient difference": GRADIENT_GATE}
    return run.costs(found, {name: found[name] <= gate for name, gate in gates.items()})
