"""Optimising a LoRA on a MODEL against the likeness of the pictures it makes (SISO)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..conditioning import Conditioning, detached, single_prompt
from ..fine_tune import Prompt
from ..fitting import curve
from ..lora import TEXT_LAYERS, attention_layers, beside, factors, new_adapters
from ..runs import digest
from ..siso import ITERATIONS, RANK, TEXT, Keep, Siso, SisoSettings, Term, background_error
from ..training import Result, Run, stored_run, train
from ..trajectory import check_sigmas
from ..tuned import Tuned
from .describe import describe
from .differentiable import TextEncoder, decode
from .embedding_training import EVERY, run_store
from .fingerprint import fingerprint, patches_digest, precision
from .progress import Progress
from .sampling import noisy
from .session import GuiderDenoiser, optimise
from .similarity import Similarity

METHOD = "siso"
DECODER_FACTOR = 4.0  # of the memory that ComfyUI estimates for a decoding without a gradient


@dataclass(frozen=True)
class Sampling:
    """How a picture is made in every iteration. latent [1, C, h, w] as in a LATENT: where it starts; zeros for noise
    alone. grad_steps: how many of the last steps have a gradient.
    """

    latent: Tensor
    sigmas: Tensor
    seed: int
    cfg: float = 1.0
    grad_steps: int = 1


@dataclass(frozen=True)
class Background:
    """A picture [1, H, W, 3] to keep outside of a mask [1, H, W], for editing."""

    picture: Tensor
    mask: Tensor
    weight: float


@dataclass(frozen=True)
class Plan:
    """How long, and what is trained."""

    iterations: int = ITERATIONS
    rank: int = RANK
    keep: Keep = "best"
    checkpointing: bool = False


@dataclass(frozen=True)
class Optimised:
    """lora: tensors for stock loaders, of the kept iteration. picture [1, H, W, 3]: the best; pictures [N, H, W, 3]:
    of every iteration; losses and parts (a number for each term) likewise.
    """

    lora: dict[str, Tensor]
    picture: Tensor
    pictures: Tensor
    losses: list[float]
    parts: list[list[float]]

    header: dict[str, Any] = field(default_factory=dict)

    @property
    def best(self) -> int:
        """The iteration with the lowest loss, from 0."""
        return min(range(len(self.losses)), key=self.losses.__getitem__)

    def tuned(self) -> Tuned:
        """The LoRA as the pack's and stock nodes take it."""
        return Tuned(self.lora, self.header)

    def report(self) -> str:
        """The best iteration, and its loss beside the first one's, term by term."""
        terms = " ".join(f"{value:.4f}" for value in self.parts[self.best])
        first = " ".join(f"{value:.4f}" for value in self.parts[0])
        return (
            f"best: iteration {self.best + 1} of {len(self.losses)}, loss {self.losses[self.best]:.4f} ({terms})\n"
            f"first: loss {self.losses[0]:.4f} ({first})"
        )


@dataclass(frozen=True)
class Generator:
    """What makes the pictures: a MODEL, a VAE, and a prompt. clip: its text encoder is optimised too, from `prompt`;
    else positive is fixed. negative: only with a cfg above 1.
    """

    model: Any
    vae: Any
    positive: Conditioning
    negative: Conditioning | None = None
    clip: Any | None = None
    prompt: str = ""

    def described(self) -> Any:
        """All that decides its pictures, for the key of a run."""
        text = None if self.clip is None else [self.clip.patcher, self.clip.layer_idx, self.prompt]
        put_on = [patches_digest(self.model), precision(self.model), str(self.vae.vae_dtype)]
        return [fingerprint(self.model), put_on, describe([self.vae.patcher, self.positive, self.negative, text])]


def background(picture: Tensor | None, mask: Tensor | None, weight: float) -> Background | None:
    """The background that is to stay; None without a mask. ValueError when one of the two is missing."""
    if (picture is None) != (mask is None):
        given, missing = ("picture", "mask") if mask is None else ("mask", "picture ('image')")
        raise ValueError(f"A {given} was connected without a {missing}: connect both to keep a background, or neither.")
    return None if picture is None or mask is None else Background(picture, mask, weight)


def optimise_lora(
    generator: Generator,
    similarity: Similarity,
    sampling: Sampling,
    plan: Plan,
    settings: SisoSettings,
    background: Background | None = None,
    node_id: str | None = None,
) -> Optimised:
    """Optimise (or resume, or serve from disk) a LoRA; ValueError, before any work, for what does not fit together."""
    _check(generator, similarity, sampling, background)
    kept = [] if background is None else [asdict(background)]
    what = [plan.rank, plan.keep, asdict(settings), asdict(sampling), [part.described() for part in similarity.parts]]
    key = digest([METHOD, what, generator.described(), *kept])
    progress = Progress(generator.model, plan.iterations, node_id)
    run = stored_run(run_store(), key, whole=False)
    progress.start(0 if run is None else run.step)
    if run is None or not (run.answers(plan.iterations) or _ended(run)):
        run = _optimise(generator, similarity, sampling, plan, settings, background, key, progress)
    result = dict(run.kept[run.end(plan.iterations)])
    progress.curve(run.losses)
    parts = result.pop("parts").tolist()
    picture, pictures = (result.pop(name).movedim(1, -1) for name in ("picture", "pictures"))
    result.pop("ended")
    header = {
        "method": METHOD,
        "base": fingerprint(generator.model),
        "prompt": generator.prompt,
        "weights": "LoRA",
        "settings": {**asdict(settings), "rank": plan.rank, "iterations": len(run.losses), "keep": plan.keep},
        "losses": curve(run.losses),
    }
    return Optimised(result, picture, pictures.float() / 255, run.losses, parts, header)


def _ended(run: Run) -> bool:
    """Whether it stopped by itself."""
    return run.step in run.kept and bool(run.kept[run.step]["ended"])


def _check(generator: Generator, similarity: Similarity, sampling: Sampling, background: Background | None) -> None:
    single_prompt(generator.positive, "prompt")
    check_sigmas(sampling.sigmas)
    if not any(part.weight > 0 for part in similarity.parts):
        raise ValueError("The similarity has no part with a weight above 0: nothing would be learned.")
    if sampling.latent.shape[0] != 1:
        raise ValueError(f"The latent holds {sampling.latent.shape[0]} pictures: one is optimised at a time.")
    if not 1 <= sampling.grad_steps <= len(sampling.sigmas) - 1:
        raise ValueError(
            f"grad_steps is {sampling.grad_steps}, and the sampling has {len(sampling.sigmas) - 1} steps: give a "
            "number from 1 to that."
        )
    if sampling.cfg != 1.0 and generator.negative is None:
        raise ValueError(f"cfg is {sampling.cfg:g} but no negative prompt is connected: connect it, or set cfg to 1.")
    layers = attention_layers(generator.model.model.diffusion_model, "diffusion_model")
    if not layers:
        raise ValueError(
            f"No attention layers that a LoRA of this pack knows are in this "
            f"{type(generator.model.model.model_config).__name__} model: use SD1.x, SD2.x or SDXL."
        )
    if background is not None and bool((background.mask > 0.5).all()):
        raise ValueError("The mask covers the whole picture, so that no background is left to keep: paint the subject.")


def _optimise(
    generator: Generator,
    similarity: Similarity,
    sampling: Sampling,
    plan: Plan,
    settings: SisoSettings,
    background: Background | None,
    key: str,
    progress: Progress,
) -> Run:
    finished: list[Run] = []
    text = None if generator.clip is None else TextEncoder(generator.clip)

    def body(denoiser: GuiderDenoiser, x0: Tensor) -> None:
        diffusion_model = denoiser.model.get_submodule("diffusion_model")
        layers = attention_layers(diffusion_model, "diffusion_model")
        if text is not None:
            layers |= attention_layers(text.patcher.model, TEXT.rstrip("."), TEXT_LAYERS)
        adapters = new_adapters(layers, plan.rank, sampling.seed, deviation=1 / plan.rank)
        with beside(layers, adapters):
            picture = _picture(generator, sampling, denoiser, x0, text)
            terms = [part.term() for part in similarity.parts if part.weight]
            if background is not None:
                terms.append(_keeping(background, x0.device))
            fit = Siso(picture, terms, factors(adapters), settings)

            def result() -> Result:
                values = fit.best if plan.keep == "best" else fit.parameters
                lora = {
                    name: value
                    for path, adapter in adapters.items()
                    for name, value in adapter.tensors(
                        path, {part: values[f"{path}.{part}"] for part in ("up", "down")}
                    ).items()
                }
                best = fit.pictures[fit.best_step] if fit.picture is None else fit.picture
                seen = {"picture": best.cpu(), "pictures": torch.cat(fit.pictures)}
                return {**lora, **seen, "parts": torch.tensor(fit.parts), "ended": torch.tensor(fit.done)}

            def on_update(pixels: Tensor) -> None:
                progress.update(fit.losses, picture=pixels[0])

            header = {"method": METHOD, "settings": asdict(settings)}
            run = train(fit, plan.iterations, EVERY, result, run_store(), key, header, on_update, done=lambda: fit.done)
            finished.append(run)

    shape = tuple(sampling.latent.shape)
    optimise(
        generator.model,
        generator.positive,
        sampling.latent,
        body,
        negative=generator.negative,
        checkpointing=plan.checkpointing,
        text=None if text is None else text.patcher,
        others=[generator.vae.patcher, *similarity.patchers],
        more_memory=DECODER_FACTOR * generator.vae.memory_used_decode(shape, generator.vae.vae_dtype),
    )
    return finished[0]


def _picture(
    generator: Generator, sampling: Sampling, denoiser: GuiderDenoiser, x0: Tensor, text: TextEncoder | None
) -> Callable[[], Tensor]:
    """The function that makes a picture [1, 3, H, W] in 0..1: Euler steps, of which the last have a gradient."""
    scheme = generator.model.get_model_object("model_sampling")
    latent_format = generator.model.get_model_object("latent_format")
    sigmas = detached(sampling.sigmas).to(x0)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(sampling.seed)).to(x0)
    start = noisy(scheme, noise, x0, sigmas)
    steps, unguided = len(sigmas) - 1, denoiser.of("negative") if sampling.cfg != 1.0 else None
    tokens = None if text is None else text.tokens(generator.prompt)

    def predicted(x: Tensor, sigma: Tensor, prompt: Prompt | None) -> Tensor:
        given = (None, None) if prompt is None else (prompt.context, prompt.pooled)
        found = denoiser.denoised(x, sigma.view(1), *given)
        if unguided is None:
            return found
        against = unguided.denoised(x, sigma.view(1))
        return against + sampling.cfg * (found - against)

    def make() -> Tensor:
        x, prompt = start, None if text is None else text.encode(tokens)
        for step in range(steps):
            with torch.set_grad_enabled(step >= steps - sampling.grad_steps):
                sigma, following = sigmas[step], sigmas[step + 1]
                found = predicted(x, sigma, prompt)
                x = x + (x - found) / sigma * (following - sigma)
        samples = latent_format.process_out(scheme.inverse_noise_scaling(sigmas[-1], x))
        return decode(generator.vae, samples).movedim(-1, 1).clamp(0, 1)

    return make


def _keeping(background: Background, device: torch.device) -> Term:
    """The loss outside of the mask."""
    source = detached(background.picture)[..., :3].movedim(-1, 1).to(device)
    mask = (detached(background.mask).reshape(1, 1, *background.mask.shape[-2:]) > 0.5).to(source)

    def loss(picture: Tensor) -> Tensor:
        return background.weight * background_error(picture, source, mask)

    return loss
