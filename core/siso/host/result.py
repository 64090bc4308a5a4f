"""What an optimisation against likeness leaves: LoRA, images and their losses; and where its runs are kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ...fit.train import Result, Run
from ...lora.artifact import FineTunedWeights
from ...lora.host.layers import LoraLayers
from ...lora.low_rank import LowRank
from ..siso import Keep, Siso, SisoSettings

SEEN = ("picture", "pictures", "parts")  # of a fit's state: what its result shows beside the LoRA
BYTES_PER_NUMBER = 4 * 10  # of a LoRA, in a run: itself and the best one, each twice, and the optimiser's two to four


@dataclass(frozen=True)
class Optimised:
    """lora: tensors for stock loaders, of the kept iteration. image [1, H, W, 3]: the best; images [N, H, W, 3]:
    of every iteration; losses and parts (a number for each term) likewise.
    """

    lora: dict[str, Tensor]
    image: Tensor
    images: Tensor
    losses: list[float]
    parts: list[list[float]]
    keep: Keep = "best"
    header: dict[str, Any] = field(default_factory=dict)

    @property
    def best(self) -> int:
        """The iteration with the lowest loss, from 0."""
        return min(range(len(self.losses)), key=self.losses.__getitem__)

    def tuned(self) -> FineTunedWeights:
        """The LoRA as the pack's and stock nodes take it."""
        return FineTunedWeights(self.lora, self.header)

    def report(self) -> str:
        """The best iteration, and its loss beside the first one's, term by term."""
        terms = " ".join(f"{value:.4f}" for value in self.parts[self.best])
        first = " ".join(f"{value:.4f}" for value in self.parts[0])
        told = (
            f"best: iteration {self.best + 1} of {len(self.losses)}, loss {self.losses[self.best]:.4f} ({terms})\n"
            f"first: loss {self.losses[0]:.4f} ({first})"
        )
        warned = self.warning()
        return told if warned is None else f"{told}\n{warned}"

    def warning(self) -> str | None:
        """What to try when no image was better than the first."""
        if self.best > 0 or len(self.losses) < 2:
            return None
        so = ", so the LoRA changes nothing" if self.keep == "best" else ""
        return (
            f"No image was more like the subject than the first{so}: try another learning rate (ten times lower, or "
            "higher), a prompt that names the subject's class, or another seed."
        )


def both_loras(fit: Siso, trained: LoraLayers, adapters: Mapping[str, LowRank]) -> Result:
    """The LoRA of the best image and that of the last iteration; which one is wanted may change later."""
    kinds = {"best": fit.best, "last": fit.parameters}
    return {
        f"{kind}.{name}": value
        for kind, values in kinds.items()
        for name, value in trained.tensors(adapters, values).items()
    }


def lora_of(run: Run, keep: Keep) -> dict[str, Tensor]:
    """The one that is to be kept, of a run's end."""
    prefix = f"{keep}."
    return {name[len(prefix) :]: value for name, value in run.results[run.step].items() if name.startswith(prefix)}


def answers(run: Run, iterations: int, settings: SisoSettings) -> bool:
    """Whether a stored run needs no further iteration: enough were made, or it ended by itself, as the settings of now
    count it.
    """
    return run.step in run.results and (run.step >= iterations or settings.end(settings.plateau(run.losses)))


def run_bytes(vae: Any, latent: Tensor, iterations: int, trained: LoraLayers, rank: int) -> int:
    """Bytes of a run as long as this may become, with the image of every iteration."""
    cell = vae.spacial_compression_decode()
    images = (iterations + 4) * 3 * latent.shape[-2] * latent.shape[-1] * cell**2  # the best one has float32
    return images + BYTES_PER_NUMBER * trained.numbers(rank)
