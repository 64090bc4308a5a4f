"""The interface of every optimisation in the pack: one update at a time, and a state made of tensors only.

A run that is stopped and resumed must match an uninterrupted one bit for bit. So a Fit owns everything an update
depends on (parameters, Adam moments, losses) and can save and restore it as named tensors. Randomness in an update
depends only on the seed and the update's number, so an update that is interrupted halfway leaves no trace.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor


class Fit(Protocol):
    """One optimization in progress. A Fit that can finish early also has a property `done`."""

    losses: list[float]
    """The loss of every update so far."""

    @property
    def step(self) -> int:
        """Number of updates made."""
        ...

    def update(self) -> Tensor:
        """Make one update; return the current denoised estimate [1, C, h, w], detached, for the preview."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Everything the next update depends on, detached; store or copy it before that update."""
        ...

    def restore(self, state: dict[str, Tensor]) -> None:
        """Load a state returned by state(); the fit takes ownership of the tensors."""
        ...


def step_generator(seed: int, step: int, purpose: str = "") -> torch.Generator:
    """The random generator for one update; different for every seed, step and purpose."""
    sha = hashlib.sha256(f"{seed} {step}{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(sha[:8], "little") >> 1)


def adam_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The moments of an Adam-like optimiser, not copied, as tensors adam.<parameter index>.<name>."""
    tensors = {}
    for index, moments in optimizer.state_dict()["state"].items():
        for name, value in moments.items():
            tensors[f"adam.{index}.{name}"] = torch.as_tensor(value).detach()
    return tensors


def restore_adam(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Inverse of adam_state()."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("adam."):
            _, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def group_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Numbers in the parameter groups, which some optimisers (Prodigy) change, as tensors group.<index>.<name>."""
    return {
        f"group.{index}.{name}": torch.tensor(float(value), dtype=torch.float64)
        for index, group in enumerate(optimizer.param_groups)
        for name, value in group.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def restore_groups(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Inverse of group_state()."""
    for key, value in tensors.items():
        if key.startswith("group."):
            _, index, name = key.split(".", 2)
            group = optimizer.param_groups[int(index)]
            group[name] = type(group.get(name, 0.0))(value.item())


@contextlib.contextmanager
def rollback_on_interrupt(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Undo an optimizer step when the block is interrupted, for updates that run the model again after their step.

    Parameters and moments are restored; an update must change anything else only after this block.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    values = [parameter.detach().clone() for parameter in parameters]
    moments = {name: moment.clone() for name, moment in adam_state(optimizer).items()}
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for parameter, value in zip(parameters, values, strict=True):
                parameter.copy_(value)
        restore_adam(optimizer, moments)
        raise


def finite_or_raise(number: Tensor, step: int, name: str = "loss") -> float:
    """A loss (or gradient norm) as a float; RuntimeError when it is not finite, before the update is applied."""
    value = float(number.detach())
    if not torch.isfinite(number.detach()):
        raise RuntimeError(
            f"The {name} became {value} at step {step + 1}: nothing was updated and the steps before it are kept. "
            "Lower the learning rate, or load the model in bf16 or fp32."
        )
    return value


def gradient_or_raise(gradient: Tensor | None, step: int) -> None:
    """RuntimeError when the gradient [n, d] of learned tokens is not finite, or when the first one is zero for any."""
    values = torch.as_tensor(gradient)
    finite_or_raise(values.square().sum(), step, "gradient")
    unseen = int((~values.any(-1)).sum())
    if step == 0 and unseen:
        raise RuntimeError(
            f"{unseen} of the {values[..., 0].numel()} learned tokens get no gradient, expected is a model that looks "
            "at the end of a prompt: this one masks it, so that nothing would be learned there. Use another model with "
            "this node."
        )


def curve(losses: Iterable[float], points: int = 200) -> list[float]:
    """At most `points` means of consecutive losses: the resolution of a plot of this width."""
    values = torch.tensor(list(losses), dtype=torch.float64)
    if len(values) <= points:
        return [float(v) for v in values]
    return [float(part.mean()) for part in torch.tensor_split(values, points)]
