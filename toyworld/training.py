"""What every training stage shares: processes that average gradients, the optimiser, and resumable state on disk.

The gradients are averaged over `TOYWORLD_RANKS` processes (gloo). Every process holds the same weights and the same
optimiser state, so process 0 can save the run alone, and every step's randomness comes from (seed, step, rank): a
resumed run draws what the uninterrupted one would have drawn.
"""

from __future__ import annotations

import argparse
import datetime
import math
import os
import time
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

RANK = int(os.environ.get("TOYWORLD_RANK", "0"))
RANKS = int(os.environ.get("TOYWORLD_RANKS", "1"))
WORK = Path(os.environ.get("TOYWORLD_WORK") or Path(__file__).resolve().parents[1] / ".sandbox" / "toyworld")
# Coefficients of the quintic Newton-Schulz iteration of Muon (K. Jordan and others, 2024).
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def start() -> None:
    """One thread per process (more only wait for each other); join the other processes if there are any."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    WORK.mkdir(parents=True, exist_ok=True)
    if RANKS > 1:
        dist.init_process_group(
            "gloo",
            init_method="file://" + os.environ["TOYWORLD_MEETING"],
            rank=RANK,
            world_size=RANKS,
            timeout=datetime.timedelta(minutes=10),
        )


def log(*values: object) -> None:
    """Print from process 0 only."""
    if RANK == 0:
        print(time.strftime("%H:%M:%S"), *values, flush=True)


def step_generator(seed: int, step: int) -> torch.Generator:
    """The random numbers of one step on this process."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * 64 + RANK)


def stopping_point(options: argparse.Namespace) -> int:
    """The step before which this run ends: the last one, or an earlier one of `--until`."""
    return min(options.steps, options.until or options.steps)


def schedule(step: int, steps: int, warm_up: int, decay_from: float) -> float:
    """Learning-rate factor: linear warm-up, constant, then from `decay_from` x steps on a cosine down to 1 %."""
    done = step / steps
    rise = min(1.0, (step + 1) / warm_up)
    if done < decay_from:
        return rise
    return rise * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, (done - decay_from) / (1 - decay_from)))))


class Muon:
    """Muon for the hidden matrices, Adam for the rest.

    Muon replaces the momentum of a weight matrix by its nearest orthogonal matrix. Convolution kernels count as
    matrices [out, in * k * k]. The orthogonalisations are shared out over the processes and gathered with one
    all-reduce; they are computed in `precision`.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        others: Iterable[nn.Parameter],
        rate: float,
        adam_rate: float,
        momentum: float = 0.95,
        precision: torch.dtype = torch.float32,
    ) -> None:
        self.matrices, self.others = list(matrices), list(others)
        self.parameters = self.matrices + self.others
        self.rate, self.adam_rate, self.momentum, self.precision = rate, adam_rate, momentum, precision
        self.buffers = [torch.zeros_like(parameter) for parameter in self.matrices]
        self.adam = torch.optim.Adam(self.others, lr=adam_rate, betas=(0.9, 0.99))
        self.shares = self._share_out()

    def _share_out(self) -> list[tuple[int, list[int]]]:
        """(process, indices of equally shaped matrices) groups with about the same work per process."""
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for index, matrix in enumerate(self.matrices):
            by_shape.setdefault(tuple(matrix.flatten(1).shape), []).append(index)
        shares, load = [], [0.0] * RANKS
        for (rows, columns), indices in sorted(by_shape.items(), key=lambda item: -len(item[1]) * math.prod(item[0])):
            for part in [indices[rank::RANKS] for rank in range(RANKS)]:
                if part:
                    rank = load.index(min(load))
                    load[rank] += len(part) * rows * columns * min(rows, columns)
                    shares.append((rank, part))
        return shares

    def _average(self, tensors: list[torch.Tensor], factor: float) -> list[torch.Tensor]:
        """Sum `tensors` over the processes and multiply by `factor`."""
        if RANKS == 1:
            return tensors
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        flat *= factor
        parts = flat.split([tensor.numel() for tensor in tensors])
        return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]

    @torch.no_grad()
    def step(self, factor: float, clip: float = 1.0) -> float:
        """Average the gradients, clip their norm to `clip`, update with rates times `factor`; returns the norm."""
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        for parameter, gradient in zip(self.parameters, self._average(gradients, 1 / RANKS), strict=True):
            parameter.grad = gradient
        norm = float(nn.utils.clip_grad_norm_(self.parameters, clip))
        updates = [torch.zeros_like(matrix) for matrix in self.matrices]
        for buffer, matrix in zip(self.buffers, self.matrices, strict=True):
            buffer.lerp_(matrix.grad, 1 - self.momentum)
        for rank, indices in self.shares:
            if rank != RANK:
                continue
            stack = torch.stack(
                [self.matrices[i].grad.lerp(self.buffers[i], self.momentum).flatten(1) for i in indices]
            )
            for index, update in zip(indices, orthogonalise(stack.to(self.precision)), strict=True):
                updates[index] = update.view_as(self.matrices[index])
        if self.matrices:
            for matrix, update in zip(self.matrices, self._average(updates, 1.0), strict=True):
                matrix.add_(update, alpha=-self.rate * factor)
        for group in self.adam.param_groups:
            group["lr"] = self.adam_rate * factor
        self.adam.step()
        for parameter in self.parameters:
            parameter.grad = None
        return norm

    def state_dict(self) -> dict:
        """Momentum of the matrices and Adam's state of the rest."""
        return {"buffers": self.buffers, "adam": self.adam.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict` gave."""
        for buffer, saved in zip(self.buffers, state["buffers"], strict=True):
            buffer.copy_(saved)
        self.adam.load_state_dict(state["adam"])


def orthogonalise(stack: torch.Tensor) -> torch.Tensor:
    """Nearest orthogonal matrices of a stack [N, rows, columns] by five Newton-Schulz steps, scaled as Muon does."""
    tall = stack.shape[1] > stack.shape[2]
    x = stack.transpose(1, 2) if tall else stack
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(5):
        gram = x @ x.transpose(1, 2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    x = x.transpose(1, 2) if tall else x
    return x * max(1.0, x.shape[1] / x.shape[2]) ** 0.5


class Average:
    """Exponential moving average of parameters (a shorter one in the first steps)."""

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float = 0.998) -> None:
        self.parameters, self.decay = list(parameters), decay
        self.values = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the parameters."""
        decay = min(self.decay, (1 + step) / (12 + step))
        torch._foreach_lerp_(self.values, [parameter.detach() for parameter in self.parameters], 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange parameters and averages (call twice to undo)."""
        for parameter, value in zip(self.parameters, self.values, strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(value)
            value.copy_(kept)


class Keeper:
    """Saves a run's state once a minute (process 0) and restores it at the start (every process)."""

    def __init__(self, name: str, parts: dict[str, object], every_s: float = 60.0) -> None:
        self.path, self.parts, self.every_s, self.last = WORK / f"{name}_state.pt", parts, every_s, time.time()

    def resume(self) -> int:
        """Load the saved state if there is one; returns the step to go on with."""
        if not self.path.exists():
            return 0
        saved = torch.load(self.path, weights_only=True)
        for key, part in self.parts.items():
            if isinstance(part, Average):
                part.values = saved[key]
            else:
                part.load_state_dict(saved[key])
        log("resumed", self.path.name, "at step", saved["step"])
        return saved["step"]

    def save(self, step: int, now: bool = False) -> bool:
        """Save `step` steps' state if a minute has passed or `now`; returns whether it did."""
        if RANK or (time.time() - self.last < self.every_s and not now):
            return False
        state = {
            key: part.values if isinstance(part, Average) else part.state_dict() for key, part in self.parts.items()
        }
        part_path = self.path.with_suffix(".part")
        torch.save({**state, "step": step}, part_path)
        os.replace(part_path, self.path)
        self.last = time.time()
        return True
