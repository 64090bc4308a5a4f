"""The interface of every optimisation in the pack: one update at a time, and a state made of tensors only.

A run that is stopped and resumed must match an uninterrupted one bit for bit. So a Fit owns everything an update
depends on (parameters, Adam moments, losses) and can save and restore it as named tensors. Randomness in an update
depends only on the seed and the update's number, so an update that is interrupted halfway leaves no trace.
"""

import contextlib
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

GROUP = 1 << 24  # bytes of weights that an optimizer updates together


class Fit(ABC):
    """One optimization in progress. A Fit that can finish early also has a property `done`."""

    losses: list[float]
    """The loss of every update so far."""
    optimizer: torch.optim.Optimizer
    """Adam or similar."""
    parameters: Mapping[str, Tensor]
    """What is optimized; in the state under these names, behind the prefix."""
    prefix: ClassVar[str] = ""
    advice: str = ""
    """What is better than a loss that rises; empty where it may rise."""

    @property
    def step(self) -> int:
        """Number of updates made."""
        return len(self.losses)

    @abstractmethod
    def update(self) -> Tensor:
        """Make one update; return the current denoised estimate [1, C, h, w], detached, for the preview."""

    def descend(self, loss: Tensor, leaf: Tensor) -> None:
        """One step of the optimizer, down the gradient of a loss that depends on this leaf alone."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        finite_or_raise(torch.as_tensor(leaf.grad).square().sum(), self.step, "gradient")
        self.optimizer.step()

    def state(self) -> dict[str, Tensor]:
        """Everything the next update depends on, detached; store or copy it before that update."""
        losses = torch.tensor(self.losses, dtype=torch.float64)
        return {**self.own_state(), "losses": losses, **adam_state(self.optimizer)}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Load a state returned by state(); the fit takes ownership of the tensors."""
        self.restore_own(state)
        self.losses = state["losses"].tolist()
        restore_adam(self.optimizer, state)

    def own_state(self) -> dict[str, Tensor]:
        """The part of the state besides losses and moments."""
        return {self.prefix + name: value.detach() for name, value in self.parameters.items()}

    def restore_own(self, state: dict[str, Tensor]) -> None:
        """Inverse of own_state(); it may make a new optimizer."""
        with torch.no_grad():
            for name, value in self.parameters.items():
                value.copy_(state[self.prefix + name])


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
    for _, index, name in (key.split(".", 2) for key in tensors if key.startswith("adam.")):
        state.setdefault(int(index), {})[name] = tensors[f"adam.{index}.{name}"]
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def in_groups(leaves: Iterable[Tensor]) -> list[dict[str, Any]]:
    """Parameter groups, in the order of the leaves, for an optimizer with foreach=True: its loop over the tensors of a
    group runs in C++, with the results of a loop in Python, but with a second copy of the group at a time.
    """
    groups, size = [], 0
    for leaf in leaves:
        size += leaf.nbytes
        if not groups or size > GROUP:
            groups.append({"params": []})
            size = leaf.nbytes
        groups[-1]["params"].append(leaf)
    return groups


@contextlib.contextmanager
def random_numbers(seed: int = 0) -> Iterator[None]:
    """torch's own random numbers, from this seed on; afterwards they are as before. Other nodes' patches of a model,
    such as ToMe, draw from them.
    """
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        start_random_numbers(seed)
        yield


def start_random_numbers(seed: int) -> None:
    """torch.manual_seed() of what is in use: on a backend that is not, it takes milliseconds to remember the call."""
    torch.default_generator.manual_seed(seed)
    for backend in (torch.cuda, torch.xpu):
        if backend.is_initialized():
            backend.manual_seed(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)


@contextlib.contextmanager
def rollback_on_interrupt(fit: Fit, again: bool) -> Iterator[None]:
    """Undo an optimizer step when the block is interrupted, for an update that runs the model again after its step;
    again: whether it does.

    An update must change anything that is no part of the fit's state only after this block.
    """
    before = {name: value.clone() for name, value in fit.state().items()} if again else {}
    try:
        yield
    except BaseException:
        if again:
            fit.restore(before)
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


def curve(losses: Iterable[float], points: int = 200) -> list[float]:
    """At most `points` means of consecutive losses: the resolution of a plot of this width."""
    values = torch.tensor(list(losses), dtype=torch.float64)
    if len(values) <= points:
        return [float(v) for v in values]
    return [float(part.mean()) for part in torch.tensor_split(values, points)]


def running_mean(losses: list[float], share: int = 10) -> list[float]:
    """The mean of each loss and those before it, at most 1/share of all: the trend of losses that differ a hundredfold
    from timestep to timestep.
    """
    sums = torch.tensor([0.0, *losses], dtype=torch.float64).cumsum(0)
    last = torch.arange(1, len(sums))
    first = (last - max(1, len(losses) // share)).clamp(min=0)
    return ((sums[last] - sums[first]) / (last - first)).tolist()


def rises(losses: list[float], least: int = 40) -> bool:
    """Whether the loss is surely higher than it was: the logarithms of all after the first eighth, quarter or half of
    the losses have a mean that is four standard errors above that of those before.
    """
    logs = torch.tensor(losses, dtype=torch.float64).clamp(min=1e-12).log()
    for part in (8, 4, 2) if len(logs) >= least else ():
        before, after = logs[: len(logs) // part], logs[len(logs) // part :]
        error = (before.var() / len(before) + after.var() / len(after)).sqrt()
        if after.mean() - before.mean() > 4 * error:
            return True
    return False


def evenly(values: list[int], most: int) -> list[int]:
    """At most so many of these values, at equal distances, the last always among them."""
    if len(values) <= most:
        return values
    return [values[round((i + 1) * len(values) / most) - 1] for i in range(most)]
