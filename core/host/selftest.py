"""One finite-difference check for each thing the pack differentiates, on the user's own models.

Each returns a GradientCheck; its relative_error should be below 1 %. Vision models have theirs in vision.py.
Run all with `python toolbox/_load.py toolbox.selftest`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..conditioning import Conditioning
from ..gradcheck import GradientCheck, gradient_check
from ..lora import LowRank, attention_layers, beside
from .differentiable import decode, decoding, encode_tokens, text_encoding
from .session import GuiderDenoiser, optimise
from .weights import checkpointed

LORA_RANK = 4


def _noise(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _in_session(
    model: Any,
    positive: Conditioning,
    latent: Tensor,
    check: Callable[[GuiderDenoiser, Tensor, Tensor, Tensor], GradientCheck],
    checkpointing: bool,
) -> GradientCheck:
    found: list[GradientCheck] = []

    def body(denoiser: GuiderDenoiser, x0: Tensor) -> None:
        sigma = denoiser.sigmas[len(denoiser.sigmas) // 2].to(x0).view(1)
        noise = _noise(tuple(x0.shape), 1).to(x0)
        found.append(check(denoiser, denoiser.noised(x0, noise, sigma), sigma, _noise(tuple(x0.shape), 2).to(x0)))

    optimise(model, positive, latent, body, checkpointing=checkpointing)
    return found[0]


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


def check_lora(model: Any, positive: Conditioning, latent: Tensor, *, checkpointing: bool = False) -> GradientCheck:
    """The same with respect to all factors of a LoRA on the attention layers, taken as one vector."""

    def check(denoiser: GuiderDenoiser, x: Tensor, sigma: Tensor, weight: Tensor) -> GradientCheck:
        layers = attention_layers(model.model.diffusion_model, "diffusion_model")
        generator = torch.Generator().manual_seed(3)
        adapters = {name: LowRank(layer, LORA_RANK, generator) for name, layer in layers.items()}
        factors = [factor for adapter in adapters.values() for factor in (adapter.down, adapter.up)]
        for factor in factors:
            factor.requires_grad_(False)
        start = torch.cat([f.flatten() for f in factors])
        start = start + 0.01 * _noise(tuple(start.shape), 4).to(start)

        def function(vector: Tensor) -> Tensor:
            pieces = iter(vector.split([f.numel() for f in factors]))
            for adapter in adapters.values():
                for name in ("down", "up"):
                    shape = getattr(adapter, name).shape
                    adapter._parameters.pop(name, None)
                    setattr(adapter, name, next(pieces).view(shape))
            return (denoiser.denoised(x, sigma) * weight).sum()

        with beside(layers, adapters):
            return gradient_check("lora", function, start)

    return _in_session(model, positive, latent, check, checkpointing)


def check_vae_decode(vae: Any, samples: Tensor, *, checkpointing: bool = False) -> GradientCheck:
    """d (randomly weighted pixels) / d (latent)."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(decoding(vae, tuple(samples.shape)))
        if checkpointing:
            stack.enter_context(checkpointed(vae.first_stage_model, ("ResnetBlock", "AttnBlock", "Block")))
        point = samples.detach().clone().float().to(vae.device)
        weight = _noise(tuple(decode(vae, point).shape), 2).to(point)
        return gradient_check("vae decode", lambda z: (decode(vae, z) * weight).sum(), point)


def check_clip_text(clip: Any, text: str = "a photo of a cat") -> GradientCheck:
    """d (randomly weighted text rows) / d (the embedding of the prompt's third word)."""
    with text_encoding(clip):
        tokens = clip.tokenize(text)
        name = next(iter(tokens))
        part = getattr(clip.cond_stage_model, clip.cond_stage_model.clip)
        table = part.transformer.get_input_embeddings().weight
        position = 3
        start = table[tokens[name][0][position][0]].detach().float()

        def function(row: Tensor) -> Tensor:
            entries = list(tokens[name][0])
            entries[position] = (row, entries[position][1])
            rows = encode_tokens(clip, {**tokens, name: [entries, *tokens[name][1:]]})
            return (rows * _noise(tuple(rows.shape), 2).to(rows)).sum()

        return gradient_check("clip text", function, start)
