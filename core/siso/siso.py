"""SISO (Shpitzer et al. 2025, arXiv 2503.16025), eq. 2: a LoRA optimised for the generated image's similarity.

    argmin_theta  - a cos(f(x_theta), f(s)) - b cos(g(x_theta), g(s))  [+ c || (1 - m) (x_theta - x) ||^2 / |1 - m|]

x_theta is generated again in each iteration, from the same noise and the same simple prompt, and decoded with a
gradient; s is the subject's image, f and g are frozen vision models. The last term (eq. 3) is for editing: it keeps the
image x outside the mask m. There is no loss on predicted noise.

Source: the reference scripts. Deviations, each with its reason:
- image, loss and weights are stored from the same iteration. The reference code may store them from three different
  ones, and its "best" weights are references that later steps overwrite; LAST gives what is in its files;
- a new best must be below the previous one by 3 % of its magnitude. The reference code multiplies by 1.03, which is the
  same for negative losses and lets positive ones rise without bound;
- each vision model's backward pass runs separately, down to the pixels, and the sum goes back through the generator
  once: the same gradient, with only one of their graphs in memory at a time;
- the reference code computes SDXL and Sana in float32, FLUX in bf16. The host uses ComfyUI's precision, which saves
  half of the memory: an fp16 model runs in bf16 on a GPU, since gradients vanish in fp16, but in float32 for editing,
  which must start from exactly the inverted image; the autoencoder mostly in bf16. The LoRA is always float32;
- with several references, the cosine is the mean over them, as in the reference code.
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..fit.fit import Fit, finite_or_raise
from ..lora.low_rank import TEXT_PREFIX
from ..vision.measures import cosine

ITERATIONS = 50
THRESHOLD, PATIENCE = 3.0, 7  # percent; iterations
RANK = 4
MAX_NORM = 1.0  # of the gradient
BACKGROUND = 10.0  # c
Keep = Literal["best", "last"]
OptimizerName = Literal["AdamW", "Prodigy"]
Optimizer = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
"""Parameter groups, each with its lr and weight_decay -> an optimiser whose state is tensors and numbers."""
ADAMW = functools.partial(torch.optim.AdamW, foreach=True)  # one call for all of a LoRA's small tensors

Term = Callable[[Tensor], Tensor]
"""Image [1, 3, H, W] in 0..1 -> scalar loss."""


def similarity_loss(features: Tensor, references: Tensor) -> Tensor:
    """- mean cosine between features [1, D] and those of the references [N, D]; -1 if equal."""
    return -cosine(features.expand(len(references), -1), references).mean()


def background_error(image: Tensor, source: Tensor, mask: Tensor) -> Tensor:
    """Mean squared difference of images [1, C, H, W] outside a mask [1, 1, H, W] of ones and zeros.

    ValueError when the mask covers everything.
    """
    outside = 1 - mask
    count = outside.sum() * image.shape[1]
    if not float(count) > 0:
        raise ValueError("The mask covers the whole image, so that no background is left to keep: paint the subject.")
    return (outside * (image - source)).square().sum() / count


def plateau(
    losses: Iterable[float], threshold: float = THRESHOLD, published: bool = False
) -> Iterator[tuple[float, int]]:
    """After each loss: the best so far, and the number of losses since then. A loss is a new best if it is below the
    last one by `threshold` percent.

    published: the rule of the reference code, which takes a percentage of the loss itself.
    """
    best, count, margin = math.inf, 0, threshold / 100
    for loss in losses:
        limit = best * (1 + margin) if published or best == math.inf else best - margin * abs(best)
        best, count = (loss, 0) if loss < limit else (best, count + 1)
        yield best, count


@dataclass(frozen=True)
class SisoSettings:
    """The settings that determine the result, besides the generator and the terms. patience 0 never stops early.

    threshold and patience only determine the length of a run, not its iterations.
    """

    learning_rate: float = 2e-4
    weight_decay: float = 1e-2
    text_rate: float = 2e-4  # for parameters whose name begins with TEXT_PREFIX
    text_decay: float = 1e-2
    threshold: float = THRESHOLD
    patience: int = PATIENCE
    optimizer: OptimizerName = "AdamW"

    def stops(self, losses: Iterable[float]) -> bool:
        """Whether early stopping ends a run with these losses, or would have ended it before."""
        return 0 < self.patience <= max((count for _, count in plateau(losses, self.threshold)), default=0)


class Siso(Fit):
    """The optimisation of named parameters, with one iteration per update."""

    prefix = "parameter."

    def __init__(
        self,
        generate: Callable[[], Tensor],
        terms: Sequence[Term],
        parameters: Mapping[str, nn.Parameter],
        settings: SisoSettings,
        optimizer: Optimizer = ADAMW,
    ) -> None:
        """generate() returns the image [1, 3, H, W] in 0..1 with a gradient to the parameters. optimizer: the one that
        the settings name.
        """
        self.generate, self.terms, self.parameters, self.settings = generate, terms, dict(parameters), settings
        text = [parameter for name, parameter in self.parameters.items() if name.startswith(TEXT_PREFIX)]
        rest = [parameter for name, parameter in self.parameters.items() if not name.startswith(TEXT_PREFIX)]
        groups = [
            {"params": rest, "lr": settings.learning_rate, "weight_decay": settings.weight_decay},
            {"params": text, "lr": settings.text_rate, "weight_decay": settings.text_decay},
        ]
        self.optimizer = optimizer([group for group in groups if group["params"]])
        self.losses: list[float] = []
        self.parts: list[list[float]] = []  # per iteration, the value of each term
        self.best: dict[str, Tensor] = {}  # parameters of the best image
        self.images: list[Tensor] = []  # per iteration, uint8 [1, 3, H, W] on the CPU
        self.image: Tensor | None = None  # the best image, [1, 3, H, W]

    @property
    def done(self) -> bool:
        """Whether the losses have stopped falling."""
        return self.settings.stops(self.losses)

    def update(self) -> Tensor:
        image = self.generate()
        pixels = image.detach().requires_grad_(True)
        parts = []
        for term in self.terms:
            loss = term(pixels)
            parts.append(finite_or_raise(loss, self.step))
            if loss.requires_grad:
                loss.backward()
        value = sum(parts)
        if pixels.grad is None:
            raise RuntimeError("None of the likeness terms has a gradient to the image: give one a weight above 0.")
        self.optimizer.zero_grad(set_to_none=True)
        image.backward(pixels.grad)
        finite_or_raise(nn.utils.clip_grad_norm_(self.parameters.values(), MAX_NORM), self.step, "gradient")
        better = not self.losses or value < min(self.losses)
        best = {name: value.detach().clone() for name, value in self.parameters.items()} if better else self.best
        self.optimizer.step()
        self.best, self.image = best, pixels.detach() if better else self.image
        self.losses.append(value)
        self.parts.append(parts)
        self.images.append((255 * pixels.detach()).round().byte().cpu())
        return pixels.detach()

    def own_state(self) -> dict[str, Tensor]:
        groups = {  # numbers in them, which some optimizers (Prodigy) change
            f"group.{index}.{name}": torch.tensor(float(value), dtype=torch.float64)
            for index, group in enumerate(self.optimizer.param_groups)
            for name, value in group.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool)
        }
        return {
            **super().own_state(),
            **{f"best.{name}": value for name, value in self.best.items()},
            **({} if self.image is None else {"picture": self.image}),
            "pictures": torch.cat(self.images),
            "parts": torch.tensor(self.parts, dtype=torch.float64),
            **groups,
        }

    def restore_own(self, state: dict[str, Tensor]) -> None:
        super().restore_own(state)
        device = next(iter(self.parameters.values())).device
        self.best = {name[5:]: value.to(device) for name, value in state.items() if name.startswith("best.")}
        self.image = state["picture"].to(device) if "picture" in state else None
        self.images, self.parts = list(state["pictures"].split(1)), state["parts"].tolist()
        for _, index, name in (key.split(".", 2) for key in state if key.startswith("group.")):
            group = self.optimizer.param_groups[int(index)]
            group[name] = type(group.get(name, 0.0))(state[f"group.{index}.{name}"].item())
