"""The result of a similarity optimisation: LoRA, images and losses."""

from dataclasses import dataclass

from torch import Tensor

from ...lora.artifact import FineTunedWeights
from ..siso import Keep

IMAGE_STATE = ("picture", "pictures", "parts")  # entries of a fit's state that belong to its result


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
