"""One finite-difference check for each thing the pack differentiates, on the user's own models.

Each returns a GradientCheck; its relative_error should be below 1 %.
Run all with `python toolbox/_load.py benchmarks.gradients`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.lora.host.layers import trained_layers
from ..core.lora.low_rank import attached_lora, new_adapters
from ..core.prompt.conditioning import Conditioning
from ..core.session.checkpointing import DECODER, checkpointed, layers_checkpointed
from ..core.session.differentiable import TextEncoder, decode
from ..core.session.session import GuiderDenoiser, Session
from ..core.session.weights import gradients, load_fully, out_of_place, thawed
from ..core.vision.host.vision import features

LORA_RANK = 4
AGREE = 1e-3
LARGEST = 1 << 21  # numbers of a weight; token tables have more, and almost all of theirs get no gradient


@dataclass(frozen=True)
class GradientCheck:
    """The slope of a function along one direction, by backward and by central differences."""

    name: str
    analytic: float
    numeric: float

    @property
    def relative_error(self) -> float:
        return abs(self.analytic - self.numeric) / max(abs(self.numeric), 1e-12)


def gradient_check(name: str, function: Callable[[Tensor], Tensor], point: Tensor, seed: int = 0) -> GradientCheck:
    """Check d function / d point for a scalar function of one tensor.

    The direction is the gradient's own plus as much noise, so that the slope is large against float32's rounding and a
    wrong gradient cannot hide. Of several step sizes the one counts where two neighbouring slopes agree best: too long
    a step sees curvature, too short a one sees rounding. Where they agree to AGREE, no shorter step is tried: curvature
    is a ninth in the shorter one.
    """
    leaf = point.detach().clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(function(leaf), leaf)
    noise = torch.randn(point.shape, generator=torch.Generator().manual_seed(seed)).to(point)
    direction = gradient / gradient.norm().clamp_min(1e-20) + noise / noise.norm()
    direction = direction / direction.norm()
    analytic = float((gradient.double() * direction.double()).sum())
    scale = float(point.detach().norm()) or 1.0
    slopes = []
    with torch.no_grad():
        for relative in (0.03, 0.01, 0.003, 0.001, 0.0003):
            h = relative * scale
            ahead, behind = function(point + h * direction).double(), function(point - h * direction).double()
            slopes.append(float((ahead - behind) / (2 * h)))
            if len(slopes) > 1 and abs(slopes[-1] - slopes[-2]) < AGREE * abs(slopes[-1]):
                break
    best = min(range(1, len(slopes)), key=lambda i: abs(slopes[i] - slopes[i - 1]))
    return GradientCheck(name, analytic, slopes[best])


@contextlib.contextmanager
def differentiable(patcher: Any) -> Iterator[None]:
    """A loaded model alone, as a session has it."""
    with gradients():
        load_fully([patcher], 0.0)
        with thawed([patcher.model]), out_of_place(patcher.model):
            yield


def _noise(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _in_session(
    model: Any,
    positive: Conditioning,
    latent: Tensor,
    check: Callable[[GuiderDenoiser, Tensor, Tensor, Tensor], GradientCheck],
    checkpointing: bool,
    **more: Any,
) -> GradientCheck:
    found: list[GradientCheck] = []

    def body(denoiser: GuiderDenoiser, x0: Tensor) -> None:
        sigma = denoiser.sigmas[len(denoiser.sigmas) // 2].to(x0).view(1)
        noise = _noise(tuple(x0.shape), 1).to(x0)
        found.append(check(denoiser, denoiser.noised(x0, noise, sigma), sigma, _noise(tuple(x0.shape), 2).to(x0)))

    Session(model, positive, latent, checkpointing=checkpointing, **more).run(body)
    return found[0]


@contextlib.contextmanager
def _as_one(slots: list[tuple[nn.Module, str]]) -> Iterator[tuple[Tensor, Callable[[Tensor], None]]]:
    """Parameters of modules as one vector: yields it as it is, and a function that puts another one in its place."""
    stores = [dict(module._parameters) for module, _ in slots]
    old = [torch.as_tensor(module._parameters.pop(name)).detach() for module, name in slots]

    def put(vector: Tensor) -> None:
        for (module, name), piece, like in zip(slots, vector.split([v.numel() for v in old]), old, strict=True):
            setattr(module, name, piece.view(like.shape))

    try:
        yield torch.cat([value.flatten() for value in old]), put
    finally:
        for (module, name), store in reversed(list(zip(slots, stores, strict=True))):
            module.__dict__.pop(name, None)
            module._parameters.clear()
            module._parameters.update(store)


def check_conditioning(
    model: Any, positive: Conditioning, latent: Tensor, *, checkpointing: bool = False
) -> GradientCheck:
    """d (sum of the denoised estimate, randomly weighted) / d (text rows)."""

    def check(denoiser: GuiderDenoiser, x: Tensor, sigma: Tensor, weight: Tensor) -> GradientCheck:
        return gradient_check(
            "conditioning", lambda rows: (denoiser.denoised(x, sigma, rows) * weight).sum(), denoiser.context
        )

    return _in_session(model, positive, latent, check, checkpointing)


def check_latent(model: Any, positive: Conditioning, latent: Tensor, *, checkpointing: bool = False) -> GradientCheck:
    """The same with respect to the noisy latent."""

    def check(denoiser: GuiderDenoiser, x: Tensor, sigma: Tensor, weight: Tensor) -> GradientCheck:
        return gradient_check("latent", lambda point: (denoiser.denoised(point, sigma) * weight).sum(), x)

    return _in_session(model, positive, latent, check, checkpointing)


def check_lora(
    model: Any, positive: Conditioning, latent: Tensor, *, checkpointing: bool = False, clip: Any | None = None
) -> GradientCheck:
    """The same with respect to all factors of a LoRA on the attention layers, taken as one vector.

    clip: a text encoder that gets one too, and through which the prompt then comes.
    """
    text = None if clip is None else TextEncoder(clip)

    def check(denoiser: GuiderDenoiser, x: Tensor, sigma: Tensor, weight: Tensor) -> GradientCheck:
        layers = trained_layers(denoiser.model, None if text is None else text.patcher.model).layers
        adapters = new_adapters(layers, LORA_RANK, 3)
        slots: list[tuple[nn.Module, str]] = [
            (adapter, name) for adapter in adapters.values() for name in ("down", "up")
        ]
        with attached_lora(layers, adapters), _as_one(slots) as (start, put):
            predict = _prediction(denoiser, x, sigma, text)

            def function(vector: Tensor) -> Tensor:
                put(vector)
                return (predict() * weight).sum()

            name = "lora" if text is None else "lora of unet and text encoder"
            return gradient_check(name, function, start + 0.01 * _noise(tuple(start.shape), 4).to(start))

    return _in_session(model, positive, latent, check, checkpointing, text=None if text is None else text.patcher)


def check_weights(
    model: Any, positive: Conditioning, latent: Tensor, *, checkpointing: bool = False, clip: Any | None = None
) -> GradientCheck:
    """The same with respect to every seventh weight of the model (and the text encoder), taken as one vector."""
    text = None if clip is None else TextEncoder(clip)

    def check(denoiser: GuiderDenoiser, x: Tensor, sigma: Tensor, weight: Tensor) -> GradientCheck:
        modules: list[Any] = [denoiser.model.diffusion_model, *([] if text is None else [text.patcher.model])]
        slots = [
            (part, name)
            for module in modules
            for part in module.modules()
            for name, value in part._parameters.items()
            if value is not None and value.numel() < LARGEST
        ][::7]
        with _as_one(slots) as (start, put):
            predict = _prediction(denoiser, x, sigma, text)

            def function(vector: Tensor) -> Tensor:
                put(vector)
                return (predict() * weight).sum()

            name = "weights" if text is None else "weights of unet and text encoder"
            return gradient_check(name, function, start)

    patcher = None if text is None else text.patcher
    return _in_session(model, positive, latent, check, checkpointing, text=patcher, all_weights=True)


def _prediction(denoiser: GuiderDenoiser, x: Tensor, sigma: Tensor, text: TextEncoder | None) -> Callable[[], Tensor]:
    """The denoised estimate with the session's own prompt, or with one that the text encoder says anew each time."""
    if text is None:
        return lambda: denoiser.denoised(x, sigma)
    tokens = text.tokens("a photo of a (cat:1.2)")

    def predict() -> Tensor:
        prompt = text.encode(tokens)
        return denoiser.denoised(x, sigma, prompt.context, prompt.pooled)

    return predict


def check_vae_decode(vae: Any, samples: Tensor, *, checkpointing: bool = False) -> GradientCheck:
    """d (randomly weighted pixels) / d (latent)."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(differentiable(vae.patcher))
        if checkpointing:
            stack.enter_context(checkpointed(vae.first_stage_model, DECODER))
        point = samples.detach().clone().float().to(vae.device)
        weight = _noise(tuple(decode(vae, point).shape), 2).to(point)
        return gradient_check("vae decode", lambda z: (decode(vae, z) * weight).sum(), point)


def check_clip_text(clip: Any, text: str = "a photo of a cat") -> GradientCheck:
    """d (randomly weighted text rows) / d (the embedding of the prompt's third word)."""
    with differentiable(clip.patcher):
        tokens = clip.tokenize(text)
        name = next(iter(tokens))
        part = getattr(clip.cond_stage_model, clip.cond_stage_model.clip)
        table = part.transformer.get_input_embeddings().weight
        position = 3
        start = table[tokens[name][0][position][0]].detach().float()

        def function(row: Tensor) -> Tensor:
            entries = list(tokens[name][0])
            entries[position] = (row, entries[position][1])
            rows = clip.cond_stage_model.encode_token_weights({**tokens, name: [entries, *tokens[name][1:]]})[0]
            return (rows * _noise(tuple(rows.shape), 2).to(rows)).sum()

        return gradient_check("clip text", function, start)


def check_vision(vision: Any, pixels: Tensor, *, checkpointing: bool = False) -> GradientCheck:
    """d (randomly weighted features) / d (pixels), against finite differences."""
    recomputed = layers_checkpointed(vision.model) if checkpointing else contextlib.nullcontext()
    with differentiable(vision.patcher), recomputed:
        point = pixels.detach().clone().float().to(vision.load_device)
        width = features(vision, point).shape[1]
        weight = torch.randn(width, generator=torch.Generator().manual_seed(2)).to(point)
        return gradient_check("vision", lambda x: (features(vision, x) * weight).sum(), point)
