"""What a training step and a sampling cost beside the bare model calls, on toyworld and on transformers.

The transformers are random networks in the layouts of FLUX.1 and Z-Image, with fewer and narrower blocks: what the pack
adds is the same for a large network, so that its share there is smaller. Bare: the same forward, backward and update on
a second copy of the model, whose prompt was prepared once, without the gradient session, the guider and any hook.
Sampling: ComfyUI's sampler with an embedding in the prompt, beside as many plain tokens. Times are the process's own,
on one thread.

    python toolbox/_load.py benchmarks.cost_transformers --out benchmarks/results/cost_transformers.json
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..core.denoiser import Prompt
from ..core.embedding.hiper import HiPer, HiPerSettings
from ..core.lora.low_rank import attached_lora, factors, new_adapters
from ..core.prompt.conditioning import apply_embedding, placement_for, with_room, with_tail
from ..core.sine.fine_tune import FineTune, FineTuneSettings, Samples
from ..tests.tiny_families import Family, flux_layout, lumina_layout
from . import frame, hosting

GATES = {"embedding step": 1.05, "LoRA step": 1.05, "sampling": 1.03}
TOKENS, STEPS = 5, 4
by_turns = functools.partial(frame.by_turns, clock=time.process_time)
LAYOUTS = {
    "FLUX": Family(
        "Flux",
        "Flux",
        flux_layout(image_model="flux", context_in_dim=4096, hidden_size=384, num_heads=3, depth_single_blocks=4)
        | {"axes_dim": [16, 56, 56]},
        *(256, 4096, 768),
        options=lambda _: {"guidance": 3.5},
        latent=(1, 16, 16, 16),
    ),
    "Z-Image": Family(
        "Lumina2",
        "ZImage",
        lumina_layout(
            **{"dim": 384, "n_heads": 3, "n_kv_heads": 3, "axes_dims": [32, 48, 48], "rope_theta": 256.0},
            **{"axes_lens": [1536, 512, 512], "ffn_dim_multiplier": 8 / 3, "z_image_modulation": True, "n_layers": 6},
            **{"time_scale": 1000.0, "pad_tokens_multiple": 32, "cap_feat_dim": 2560, "n_refiner_layers": 2},
        ),
        *(24, 2560),
        padded=False,
        latent=(1, 16, 16, 16),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """How often each is timed, and the LoRA."""

    rounds: int = 20
    rank: int = 16


@dataclass(frozen=True)
class Case:
    """A model with two prompts and the samples of a LATENT."""

    model: Any
    prompt: list
    negative: list
    samples: torch.Tensor


class Bare:
    """A copy of a model's network, with the prompt prepared once."""

    def __init__(self, case: Case, x0: torch.Tensor) -> None:
        self.base = copy.deepcopy(case.model.model).requires_grad_(False)
        context, options = case.prompt[0]
        entry = {**options, "cross_attn": context, "noise": x0, "latent_image": x0, "device": x0.device}
        conds = self.base.extra_conds(**entry, prompt_type="positive")
        self.conds = {
            name: each.process_cond(batch_size=1, area=None, device="cpu").cond for name, each in conds.items()
        }
        self.sampling, self.options = self.base.model_sampling, hosting.plain_attention()

    def loss(self, x0: torch.Tensor, context: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """The squared error of the output at a random timestep."""
        generator, sigmas = torch.Generator().manual_seed(0), self.sampling.sigmas.float()

        def run() -> torch.Tensor:
            sigma = sigmas[torch.randint(0, len(sigmas), (1,), generator=generator)]
            x = self.sampling.noise_scaling(sigma.view(1, 1, 1, 1), torch.randn(x0.shape, generator=generator), x0)
            conds = {**self.conds, "c_crossattn": context()}
            denoised = self.base._apply_model(x, sigma, transformer_options=dict(self.options), **conds)
            return ((x0 - denoised) / sigma).square().mean()

        return run


def embedding_step(case: Case, rounds: int) -> dict[str, float]:
    """An update of HiPer."""
    from ..core.session.session import Session

    prompt = with_room(case.prompt, TOKENS, placement_for(case.model, case.prompt))
    context, found = prompt[0][0].clone(), []
    start = 0.1 * torch.randn(TOKENS, context.shape[-1], generator=torch.Generator().manual_seed(1))

    def body(denoiser: Any, x0: torch.Tensor) -> None:
        x0 = x0.clone()
        fit = HiPer(denoiser, x0, context, start, HiPerSettings())
        h = start.clone().requires_grad_(True)
        loss = Bare(Case(case.model, prompt, case.negative, x0), x0).loss(x0, lambda: with_tail(context, h))
        found.append(by_turns(fit.update, frame.update(loss, torch.optim.Adam([h], lr=5e-3)), rounds))

    Session(case.model, prompt, case.samples, learned=TOKENS).run(body)
    return found[0]


def lora_step(case: Case, how: Settings) -> dict[str, float]:
    """An update of a LoRA on all attention layers, on the whole image."""
    from ..core.lora.host.layers import trained_layers
    from ..core.session.session import Session

    context, found = case.prompt[0][0].clone(), []

    def body(denoiser: Any, x0: torch.Tensor) -> None:
        x0 = x0.clone()
        bare = Bare(case, x0)
        ours, plain = (trained_layers(base).layers for base in (denoiser.model, bare.base))
        adapters, others = new_adapters(ours, how.rank, 0), new_adapters(plain, how.rank, 0)
        settings = FineTuneSettings(1e-9)  # changes next to nothing from round to round
        fit = FineTune(denoiser, Samples(x0), lambda: Prompt(context), factors(adapters), settings)
        adam = torch.optim.AdamW(list(factors(others).values()), lr=1e-9)
        with attached_lora(ours, adapters), attached_lora(plain, others):
            step = frame.update(bare.loss(x0, lambda: context), adam)
            found.append(by_turns(fit.update, step, how.rounds))

    Session(case.model, case.prompt, case.samples).run(body)
    return found[0]


def sampling(case: Case, rounds: int) -> dict[str, float]:
    """A sampling with an embedding in the prompt against as many plain tokens."""
    import comfy.sample

    placement = placement_for(case.model, case.prompt)
    rows = torch.randn(1, TOKENS, case.prompt[0][0].shape[-1], generator=torch.Generator().manual_seed(1))
    embedded, room = apply_embedding(case.prompt, rows, 0.8, (), placement), with_room(case.prompt, TOKENS, placement)

    @torch.inference_mode()
    def run(positive: list) -> None:
        noise, zeros = torch.randn_like(case.samples), torch.zeros_like(case.samples)
        comfy.sample.sample(
            case.model, noise, STEPS, 4.0, "euler", "simple", positive, case.negative, zeros, disable_pbar=True
        )

    return by_turns(lambda: run(embedded), lambda: run(room), rounds)


def cases(base: Path) -> Iterator[tuple[str, Case]]:
    """The toyworld's model and a network of each layout."""
    model, clip, _ = hosting.small_world(base)
    yield (
        "SD1 (toyworld)",
        Case(model, *hosting.encoded(clip, "a photo of a dog in the snow", ""), hosting.latents()[0]),
    )
    for name, family in LAYOUTS.items():
        yield name, Case(family.model(), family.prompt(1), family.prompt(3), family.latents())


def figures(base: Path, how: Settings) -> Iterator[tuple[str, dict[str, float]]]:
    """All three for each."""
    for name, case in cases(base):
        yield f"embedding step, {name}", embedding_step(case, how.rounds)
        yield f"LoRA step, {name}", lora_step(case, how)
        yield f"sampling, {name}", sampling(case, how.rounds)


def main(arguments: list[str]) -> int:
    """Print the table; exit 1 when a gate is missed."""
    run = frame.Run("cost_transformers", arguments, Settings(), threads=1)
    found = run.table(figures(run.base, run.settings))
    return run.costs(found, {name: values["ratio"] <= GATES[name.split(",")[0]] for name, values in found.items()})
