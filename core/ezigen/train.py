"""Training EZIGen's adapter (Duan et al. 2024, arXiv 2409.08091): argmin || eps_theta(z_t, t, c, S) - eps ||^2.

z_t is an image that contains the subject, S the features of one to four other images of it (or cut-outs of the same
image), each alone on white, encoded at t = 1 with the prompt "a photo of a <class>.". t is uniform, the error is not
weighted, and only the adapter is trained.

Source: the reference train.py with its published settings. Deviations, each with its reason:
- the subject is dropped in one sample of ten. The reference code has the comparison reversed and drops eight
  (DROP_PUBLISHED);
- places without an image are masked; the reference code fills them with gray images, even all places of a sample;
- a batch may mix samples with different numbers of images; each sample is dropped, and draws its t and noise,
  independently;
- w has no weight decay, which would fade the subject out;
- a sample's random numbers depend only on (seed, index of the sample in the run), so that neither the number of
  processes nor a resume changes them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from ..fit.fit import Fit, finite_or_raise, step_generator
from .adapter import SUBJECT_TIMESTEP, WEIGHTS, Adapter, SubjectTokens, batch_tokens, drop_subjects

LEARNING_RATE, WEIGHT_DECAY = 1e-4, 1e-2
BETAS, EPSILON, MAX_NORM = (0.9, 0.999), 1e-8, 1.0
DROP, DROP_PUBLISHED = 0.1, 0.8
MAX_SUBJECTS = 4
TIMESTEPS = 1000


class Network(Protocol):
    """A frozen UNet that predicts noise for VP latents, and the adapter in it."""

    alphas_cumprod: Tensor
    """[T], on the CPU."""

    def capture(self, z: Tensor, timestep: Tensor, context: Tensor) -> list[Tensor]:
        """The normed inputs [R, N_i, C_i] of all self-attentions for z [R, C, h, w], without the adapter."""
        ...

    def predicted_noise(self, z: Tensor, timestep: Tensor, context: Tensor, tokens: SubjectTokens) -> Tensor:
        """[B, C, h, w], with the adapter, differentiable with respect to it."""
        ...


@dataclass(frozen=True)
class Sample:
    """One image and its subject: latents at the UNet's scale, [C, h, w] and [R, C, h', w'], and token embeddings of
    their prompts, [n, d] and [R, n, d].
    """

    latent: Tensor
    context: Tensor
    subjects: Tensor
    subject_contexts: Tensor


Samples = Callable[[Sequence[int]], list[Sample]]
"""The samples with these numbers in the run."""


@dataclass(frozen=True)
class Draw:
    timestep: int
    dropped: bool
    generator: torch.Generator  # of the image's noise, then of the subject's


def draw(seed: int, index: int, drop: float) -> Draw:
    """The draws of sample number `index` of the run."""
    generator = step_generator(seed, index, "adapter sample")
    timestep = int(torch.randint(TIMESTEPS, (1,), generator=generator))
    return Draw(timestep, bool(torch.rand(1, generator=generator) < drop), generator)


def at_timestep(z: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """z_t = sqrt(alpha_bar) z + sqrt(1 - alpha_bar) eps; alpha_bar [B]."""
    alpha_bar = alpha_bar.to(z).view(-1, *[1] * (z.ndim - 1))
    return alpha_bar.sqrt() * z + (1 - alpha_bar).sqrt() * noise


def subject_features(network: Network, latents: Tensor, contexts: Tensor, noise: Tensor) -> list[Tensor]:
    """The features of subject images [R, C, h, w], noised to t = 1."""
    timestep = torch.full((len(latents),), SUBJECT_TIMESTEP, device=latents.device)
    noisy = at_timestep(latents, noise, network.alphas_cumprod[SUBJECT_TIMESTEP].expand(len(latents)))
    with torch.no_grad():
        return network.capture(noisy, timestep, contexts)


def errors(network: Network, samples: Sequence[Sample], draws: Sequence[Draw]) -> Tensor:
    """The mean squared error of each sample, [B]."""
    z = torch.stack([sample.latent for sample in samples])
    noise = torch.stack([_noise(sample.latent, each.generator) for sample, each in zip(samples, draws, strict=True)])
    # As published, the images of one sample share their noise.
    subject_noise = [
        _noise(sample.subjects[0], each.generator).expand_as(sample.subjects)
        for sample, each in zip(samples, draws, strict=True)
    ]
    features = subject_features(
        network,
        torch.cat([sample.subjects for sample in samples]),
        torch.cat([sample.subject_contexts for sample in samples]),
        torch.cat(subject_noise),
    )
    tokens = batch_tokens(features, [len(sample.subjects) for sample in samples])
    tokens = drop_subjects(tokens, torch.tensor([each.dropped for each in draws], device=z.device))
    timesteps = torch.tensor([each.timestep for each in draws])
    noisy = at_timestep(z, noise, network.alphas_cumprod[timesteps])
    context = torch.stack([sample.context for sample in samples])
    predicted = network.predicted_noise(noisy, timesteps.to(z.device), context, tokens)
    return (predicted.float() - noise.float()).square().mean((1, 2, 3))


def _noise(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator).to(like)


@dataclass(frozen=True)
class TrainingSettings:
    """The settings that determine the result, besides the network and the samples."""

    seed: int = 0
    batch: int = 1
    learning_rate: float = LEARNING_RATE
    drop: float = DROP


class AdapterTraining(Fit):
    prefix = "adapter."

    def __init__(self, network: Network, adapter: Adapter, samples: Samples, settings: TrainingSettings) -> None:
        """The adapter is float32 and is trained in place."""
        self.network, self.adapter, self.samples, self.settings = network, adapter, samples, settings
        self.parameters = adapter.published_parameters()
        self.optimizer = optimizer(self.parameters, settings.learning_rate)
        self.losses: list[float] = []

    def restore_own(self, state: dict[str, Tensor]) -> None:
        start = len(self.prefix)
        self.adapter.load({name[start:]: value for name, value in state.items() if name.startswith(self.prefix)})

    def update(self) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        loss, latent = self.gradient()
        value = finite_or_raise(loss, self.step)
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), MAX_NORM)
        finite_or_raise(norm, self.step, "gradient")
        self.optimizer.step()
        self.losses.append(value)
        return latent

    def gradient(self) -> tuple[Tensor, Tensor]:
        """Compute the gradient of an update; returns its loss and one of its latents."""
        first = self.step * self.settings.batch
        return self.backward(range(first, first + self.settings.batch))

    def backward(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Add the gradient of the mean error of these samples; returns the error and the first one's latent."""
        samples = self.samples(numbers)
        draws = [draw(self.settings.seed, number, self.settings.drop) for number in numbers]
        loss = errors(self.network, samples, draws).mean()
        loss.backward()
        return loss.detach(), samples[0].latent[None].detach()


def optimizer(parameters: dict[str, nn.Parameter], learning_rate: float = LEARNING_RATE) -> torch.optim.AdamW:
    """AdamW with the published settings; no weight decay for w."""
    rest = [parameter for name, parameter in parameters.items() if name != WEIGHTS]
    groups = [{"params": rest}, {"params": [parameters[WEIGHTS]], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=BETAS, eps=EPSILON, weight_decay=WEIGHT_DECAY)
