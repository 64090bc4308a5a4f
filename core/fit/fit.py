"""What every optimisation of the pack has in common: one update at a time, and a state made of tensors only.

A run that is stopped and resumed must equal one that was never stopped, bit for bit. So a Fit owns everything an
update depends on (parameters, Adam moments, losses) and can hand it out and take it back as named tensors. What is
random in an update is drawn from the seed and the number of the update alone, so that one stopped half-way leaves no
trace.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor


class Fit(Protocol):
    """One optimization in progress. One that may end by itself also has a property `done`."""

    losses: list[float]
    """The loss of every update so far."""

    @property
    def step(self) -> int:
        """Number of updates made."""
        ...

    def update(self) -> Tensor:
        """Make one update; returns the current denoised estimate [1, C, h, w], detached, for the preview."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Everything that the next update depends on, detached; to be stored or copied before that update."""
        ...

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take back what state() gave; the tensors are the fit's from then on."""
        ...


def step_generator(seed: int, step: int, purpose: str = "") -> torch.Generator:
    """The random generator of one update; different for every seed, step and purpose."""
    mixed = hashlib.sha256(f"{seed} {step}{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(mixed[:8], "little") >> 1)


def adam_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The moments of an Adam-like optimiser, themselves and no copies, as tensors adam.<parameter index>.<name>."""
    packed = {}
    for index, moments in optimizer.state_dict()["state"].items():
        for name, value in moments.items():
            packed[f"adam.{index}.{name}"] = torch.as_tensor(value).detach()
    return packed


def restore_adam(optimizer: torch.optim.Optimizer, packed: dict[str, Tensor]) -> None:
    """Inverse of adam_state()."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in packed.items():
        if key.startswith("adam."):
            _, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def group_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The numbers in its parameter groups, which some optimisers (Prodigy) move, as tensors group.<index>.<name>."""
    return {
        f"group.{index}.{name}": torch.tensor(float(value), dtype=torch.float64)
        for index, group in enumerate(optimizer.param_groups)
        for name, value in group.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def restore_groups(optimizer: torch.optim.Optimizer, packed: dict[str, Tensor]) -> None:
    """Inverse of group_state()."""
    for key, value in packed.items():
        if key.startswith("group."):
            _, index, name = key.split(".", 2)
            group = optimizer.param_groups[int(index)]
            group[name] = type(group.get(name, 0.0))(value.item())


@contextlib.contextmanager
def undone_if_cut(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """For updates that ask the model once more after their step: when that is cancelled, the step is taken back.

    The parameters and moments are as before; whatever else an update changes it must change behind this block.
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
    """A loss (or gradient) as a number; RuntimeError when it is not finite, before the update could spoil anything."""
    value = float(number.detach())
    if not torch.isfinite(number.detach()):
        raise RuntimeError(
            f"The {name} became {value} at step {step + 1}: nothing was updated and the steps before it are kept. "
            "Lower the learning rate, or load the model in bf16 or fp32."
        )
    return value


def curve(losses: Iterable[float], points: int = 200) -> list[float]:
    """At most `points` means of consecutive losses: what a plot of this width can show."""
    values = torch.tensor(list(losses), dtype=torch.float64)
    if len(values) <= points:
        return [float(v) for v in values]
    return [float(part.mean()) for part in torch.tensor_split(values, points)]
