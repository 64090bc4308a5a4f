"""Optimise a LoRA on a MODEL for the similarity of its generated images to a subject (SISO)."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import comfy.sample
import torch
from torch import Tensor

from ...denoiser import Prompt
from ...fit.runs import RunStore, digest
from ...fit.train import Result, Retention, Run
from ...inversion.renoise import Replay
from ...lora.artifact import FineTunedWeights
from ...lora.host.layers import check_run, trained_layers
from ...lora.low_rank import ATTENTION, attached_lora, factors, new_adapters
from ...prompt.conditioning import Conditioning, detached, single_prompt
from ...session.checkpointing import DECODER, checkpointed, layers_checkpointed
from ...session.describe import describe
from ...session.differentiable import TextEncoder, decode
from ...session.fingerprint import patches_digest, precision
from ...session.images import check_vae, image_latents
from ...session.job import LAST, Fitted, Job, run
from ...session.memory import activations, decoding_memory, vision_memory
from ...session.sampling import noisy_start
from ...session.session import GuiderDenoiser, Session
from ...session.stores import dedicated_store
from ...vision.host.extras.offline import package
from ..siso import ADAMW, ITERATIONS, RANK, Keep, Optimizer, Siso, SisoSettings
from .background import Background
from .similarity import Similarity

SAME_TEXT = 0.05  # relative: tolerance between two encodings of one prompt; bf16 rounds by 0.01
SAFEGUARDS = {"use_bias_correction": True, "safeguard_warmup": True}  # Prodigy's, as in SISO's script
BYTES_PER_NUMBER = 4 * 10  # of a LoRA, in a run: current and best one, each twice, and the optimiser's two to four
IMAGE_STATE = ("picture", "pictures", "parts")  # entries of a fit's state that belong to its result
APART = 1_000_003  # between the seeds of two iterations' noises, so that the next seeds' stay unseen
log = logging.getLogger("likeness")


@dataclass(frozen=True)
class Sampling:
    """How the image is generated in every iteration. latent [1, C, h, w] as in a LATENT: the start; zeros for pure
    noise. grad_steps: number of last steps with a gradient. replay: of an inverted image, whose latent is the start,
    with no noise except the recorded one.
    """

    latent: Tensor
    sigmas: Tensor
    seed: int
    cfg: float = 1.0
    grad_steps: int = 1
    replay: Replay | None = None


@dataclass(frozen=True)
class SisoPlan:
    """Length of the run, and what is trained. layers: which ones get a LoRA (LAYERS). new_noise: in each iteration."""

    iterations: int = ITERATIONS
    rank: int = RANK
    keep: Keep = "best"
    checkpointing: bool = False
    layers: str = ATTENTION
    new_noise: bool = False


@dataclass(frozen=True)
class Generator:
    """The image generator: a MODEL, a VAE, and a prompt. clip: its text encoder is optimised too, on `prompt`; without
    it positive is fixed. negative: only with a cfg above 1.
    """

    model: Any
    vae: Any
    positive: Conditioning
    negative: Conditioning | None = None
    clip: Any | None = None
    prompt: str = ""


@dataclass(frozen=True)
class SisoJob(Job):
    """A complete SISO job."""

    method: ClassVar[str] = "siso"
    state: ClassVar[Collection[str]] = IMAGE_STATE
    shows_image: ClassVar[bool] = True

    generator: Generator
    similarity: Similarity
    sampling: Sampling
    plan: SisoPlan
    settings: SisoSettings
    background: Background | None = None
    retention = Retention(LAST, 2)

    @property
    def model(self) -> Any:
        return self.generator.model

    @property
    def steps(self) -> int:
        return self.plan.iterations

    def key(self) -> str:
        """Everything that determines the iterations, but not their number or which one is used."""
        settings = {
            name: value for name, value in asdict(self.settings).items() if name not in ("threshold", "patience")
        }
        made, kept, clip = self.generator, self.background, self.generator.clip
        text = None if clip is None else [clip.patcher, clip.layer_idx, made.prompt]
        base = [self.base, [patches_digest(made.model), precision(made.model), str(made.vae.vae_dtype)]]
        images = describe([made.vae.patcher, made.positive, made.negative, text])
        background = [] if kept is None else [{"picture": kept.image, "mask": kept.mask, "weight": kept.weight}]
        parts = [part.key_parts() for part in self.similarity.parts]
        training = [self.method, self.plan.rank, settings, asdict(self.sampling), parts]
        more = [] if self.plan.layers == ATTENTION else [self.plan.layers]
        more += ["new noise"] if self.plan.new_noise else []
        return digest([*training, [*base, images], *background, *more])

    def store(self) -> RunStore:
        """For the LoRAs and the image of every iteration; the best one's is float32."""
        clip, shape = self.generator.clip, self.sampling.latent.shape
        layers = trained_layers(self.model.model, None if clip is None else clip.cond_stage_model, self.plan.layers)
        images = (self.steps + 4) * 3 * shape[-2] * shape[-1] * self.generator.vae.spacial_compression_decode() ** 2
        return dedicated_store("picture_runs", images + BYTES_PER_NUMBER * layers.numbers(self.plan.rank))

    @functools.cached_property
    def text(self) -> TextEncoder | None:
        """The text encoder, if it trains too."""
        return None if self.generator.clip is None else TextEncoder(self.generator.clip)

    def is_complete(self, stored: Run) -> bool:
        """It has enough iterations, or early stopping by the current settings ends it."""
        enough = stored.step >= self.steps or self.settings.stops(stored.losses)
        return stored.step in stored.results and enough

    def end(self, done: Run) -> int:
        return done.step

    def session(self) -> Session:
        generator, visions, sampling = self.generator, self.similarity.visions, self.sampling
        recompute, latent = self.plan.checkpointing, sampling.latent
        # In addition to the first prediction: more predictions, the decoder, and the largest vision model.
        passes = sampling.grad_steps * (1 if sampling.cfg == 1.0 else 2)
        memory = (passes - 1) * activations(generator.model, latent, recompute)
        memory += decoding_memory(generator.vae, latent, recompute)
        memory += max(vision_memory(vision, recompute) for vision in visions)
        return Session(
            generator.model,
            generator.positive,
            latent,
            negative=generator.negative,
            checkpointing=recompute,
            text=None if self.text is None else self.text.patcher,
            others=[generator.vae.patcher, *(vision.patcher for vision in visions)],
            more_memory=memory,
            exact=self.sampling.replay is not None,  # the first image must be the inverted one
        )

    def fit(self, denoiser: GuiderDenoiser, x0: Tensor) -> Fitted:
        generator, plan, text = self.generator, self.plan, self.text
        if text is not None:
            _check_prompt(text, generator)
        layers = trained_layers(denoiser.model, None if text is None else text.patcher.model, plan.layers)
        check_run(denoiser.model, layers.layers, denoiser.called)
        adapters = new_adapters(layers.layers, plan.rank, self.sampling.seed, deviation=1 / plan.rank)
        attach = denoiser.attached.enter_context
        attach(attached_lora(layers.layers, adapters))
        if plan.checkpointing:  # the session does it for the diffusion model
            attach(checkpointed(generator.vae.first_stage_model, DECODER))
            for vision in self.similarity.visions:
                attach(layers_checkpointed(vision.model))
        generate = image_sampling(generator, self.sampling, denoiser, x0, text)
        terms = [part.term() for part in self.similarity.parts if part.weight]
        if self.background is not None:
            terms.append(self.background.term())
        optimizer = prodigy() if self.settings.optimizer == "Prodigy" else ADAMW
        fit = Siso(
            lambda: generate(fit.step if plan.new_noise else 0),
            terms, factors(adapters), self.settings, optimizer,
        )  # fmt: skip

        def result() -> Result:
            """The LoRAs of the best and of the last iteration, as `keep` may change later."""
            kinds = {"best": fit.best, "last": fit.parameters}
            loras = {kind: layers.tensors(values) for kind, values in kinds.items()}
            return {f"{kind}.{name}": value for kind, lora in loras.items() for name, value in lora.items()}

        return fit, result


@dataclass(frozen=True)
class OptimizedLora:
    """lora: of the best or the last iteration (keep). image [1, H, W, 3]: the best; images
    [N, H, W, 3], losses and parts (the value of each term): of every iteration.
    """

    lora: FineTunedWeights
    image: Tensor
    images: Tensor
    losses: list[float]
    parts: list[list[float]]
    keep: Keep

    @property
    def best(self) -> int:
        """The iteration with the lowest loss, from 0."""
        return min(range(len(self.losses)), key=self.losses.__getitem__)

    def report(self) -> str:
        """The best iteration's loss and the first one's, term by term."""
        terms = " ".join(f"{value:.4f}" for value in self.parts[self.best])
        first = " ".join(f"{value:.4f}" for value in self.parts[0])
        text = (
            f"best: iteration {self.best + 1} of {len(self.losses)}, loss {self.losses[self.best]:.4f} ({terms})\n"
            f"first: loss {self.losses[0]:.4f} ({first})"
        )
        return f"{text}\n{self.warning()}".rstrip()

    def warning(self) -> str:
        """Advice if no image was better than the first."""
        if self.best > 0 or len(self.losses) < 2:
            return ""
        note = ", so the LoRA changes nothing" if self.keep == "best" else ""
        return (
            f"No image was more like the subject than the first{note}: try another learning rate (ten times lower, or "
            "higher), a prompt that names the subject's class, or another seed."
        )


def optimize_lora(job: SisoJob) -> OptimizedLora:
    """Optimize (or resume, or load from disk) a LoRA; ValueError, before any work, for inputs that do not fit."""
    generator, sampling, settings = job.generator, job.sampling, job.settings
    sampling = replace(sampling, latent=comfy.sample.fix_empty_latent_channels(generator.model, sampling.latent))
    _check(generator, job.similarity, sampling, job.background)
    if settings.optimizer == "Prodigy":
        prodigy()  # raises here if the package is missing
        settings = replace(settings, text_rate=settings.learning_rate)  # it supports one learning rate only
    if sampling.cfg == 1.0:
        generator = replace(generator, negative=None)
    if job.plan.new_noise:  # losses of different noises do not tell which LoRA is better
        if sampling.replay is not None:
            raise ValueError("The latent was inverted, which found the noises for its image: set noise to 'same'.")
        settings, job = replace(settings, patience=0), replace(job, plan=replace(job.plan, keep="last"))
    job = replace(job, generator=generator, sampling=sampling, settings=settings)
    job_run = run(job)
    image, images = (job_run.state[name].movedim(1, -1) for name in ("picture", "pictures"))
    keep, parts = job.plan.keep, job_run.state["parts"].tolist()
    lora = {name[len(keep) + 1 :]: value for name, value in job_run.last.items() if name.startswith(f"{keep}.")}
    about = {**asdict(settings), "rank": job.plan.rank, "iterations": job_run.step, "keep": keep}
    header = job.artifact_header(about, job_run.losses, prompt=generator.prompt, weights="LoRA")
    result = OptimizedLora(FineTunedWeights(lora, header), image, images.float() / 255, job_run.losses, parts, keep)
    if result.warning():
        log.warning("%s", result.warning())
    return result


def _check(generator: Generator, similarity: Similarity, sampling: Sampling, background: Background | None) -> None:
    single_prompt(generator.positive, "prompt")
    if generator.clip is not None and not generator.prompt.strip():
        raise ValueError(
            "'prompt' is empty, but a text encoder is connected to 'clip': write (or connect) there the prompt that "
            "'positive' was made from, or disconnect 'clip'."
        )
    if not any(part.weight > 0 for part in similarity.parts):
        raise ValueError("The similarity has no part with a weight above 0: nothing would be learned.")
    if sampling.latent.shape[0] != 1:
        raise ValueError(f"The latent holds {sampling.latent.shape[0]} images: one is optimised at a time.")
    if not 1 <= sampling.grad_steps <= len(sampling.sigmas) - 1:
        raise ValueError(
            f"grad_steps is {sampling.grad_steps}, and the sampling has {len(sampling.sigmas) - 1} steps: give a "
            "number from 1 to that."
        )
    if sampling.cfg != 1.0 and generator.negative is None:
        raise ValueError(f"cfg is {sampling.cfg:g} but no negative prompt is connected: connect it, or set cfg to 1.")
    image_latents(generator.model, sampling.latent)
    check_vae(generator.model, generator.vae)
    if background is not None:
        background.check(generator.vae, sampling.latent)
    levels, inverted = (each.sigmas.float().cpu() for each in (sampling, sampling.replay or sampling))
    if inverted.shape != levels.shape or not torch.allclose(inverted, levels, rtol=1e-4, atol=1e-4):
        raise ValueError(
            f"The latent was inverted along the noise levels {_round(inverted)}, and the SIGMAS are {_round(levels)}: "
            "connect the SIGMAS that came with the latent."
        )


def prodigy() -> Optimizer:
    """Prodigy (Mishchenko and Defazio 2023, arXiv 2306.06101) from its authors' package; all parameter groups share one
    learning rate. RuntimeError without the package, which is optional.
    """
    library = package("prodigyopt", "Prodigy", "prodigyopt", " (or choose AdamW)")
    return functools.partial(library.Prodigy, **SAFEGUARDS)


def _check_prompt(text: TextEncoder, generator: Generator) -> None:
    """ValueError when the text encoder, inside the session, does not encode the prompt as `positive`."""
    with torch.no_grad():
        prompt = text.encode(text.tokens(generator.prompt))
    rows, options = detached(generator.positive[0])
    pairs = [(rows, prompt.context), (options.get("pooled_output"), prompt.pooled)]
    for connected, encoded in pairs:
        if connected is None or encoded is None:
            continue
        connected, encoded = connected.float().cpu(), encoded.float().cpu()
        if connected.shape != encoded.shape or float((connected - encoded).norm()) > SAME_TEXT * float(encoded.norm()):
            raise ValueError(
                f"'clip' makes another conditioning of the prompt {generator.prompt[:80]!r} than 'positive' is: give "
                "'prompt' the very text that 'positive' was encoded from, and connect the same CLIP to both (with the "
                "same LoRAs and last layer), without nodes that change the conditioning; or disconnect 'clip'."
            )


def _round(sigmas: Tensor) -> list[float]:
    return [round(float(sigma), 4) for sigma in sigmas]


def image_sampling(
    generator: Generator, sampling: Sampling, denoiser: GuiderDenoiser, x0: Tensor, text: TextEncoder | None
) -> Callable[[int], Tensor]:
    """A function that generates an image [1, 3, H, W] in 0..1 with the current LoRA, by Euler steps of which the last
    have a gradient. Its argument is the number of the noise; 0 is the seed's.
    """
    scheme = generator.model.get_model_object("model_sampling")
    latent_format: Any = denoiser.model.latent_format  # with a gradient
    sigmas = detached(sampling.sigmas).to(x0)
    steps = len(sigmas) - 1
    replay = Replay(sigmas, x0[:0] if sampling.replay is None else detached(sampling.replay.noises).to(x0))
    unguided = denoiser.of("negative") if sampling.cfg != 1.0 else None
    tokens = None if text is None else text.tokens(generator.prompt)

    def start(number: int) -> Tensor:
        """The inverted image, or the latent with a noise."""
        if sampling.replay is not None:
            return x0
        seed = (sampling.seed + number * APART) % 2**64
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed)).to(x0)
        return noisy_start(scheme, noise, x0, sigmas)

    def predict(x: Tensor, sigma: Tensor, prompt: Prompt | None) -> Tensor:
        positive = denoiser.denoised(x, sigma, *((None, None) if prompt is None else (prompt.context, prompt.pooled)))
        if unguided is None:
            return positive
        negative = unguided.denoised(x, sigma)
        return negative + sampling.cfg * (positive - negative)

    def generate(number: int) -> Tensor:
        x, prompt = start(number), None if text is None else text.encode(tokens)
        for step in range(steps):
            with torch.set_grad_enabled(step >= steps - sampling.grad_steps):
                sigma = sigmas[step]
                x = replay.step(x, (x - predict(x, sigma.view(1), prompt)) / sigma, step)
        samples = latent_format.process_out(scheme.inverse_noise_scaling(sigmas[-1], x))
        return decode(generator.vae, samples).movedim(-1, 1).clamp(0, 1)

    return generate
