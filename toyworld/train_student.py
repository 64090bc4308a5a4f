"""Stage "student": teach a copy of a generator to do in one to four steps what it does in twenty with guidance.

At first the student learns the teacher's own pairs of noise and latent: it goes some of its one to four steps from the
noise by itself, and what it then takes for clean is compared with the teacher's latent. That is sharp where the noise
decides the picture and blurred where the student cannot tell. So from a step on half of every batch is new noise, and
all of it is pulled towards what the guided teacher finds likely (distribution matching, T. Yin and others, 2024): a
second copy of the teacher learns what the student makes, and the difference of the two answers is the direction.
"""

from __future__ import annotations

import argparse
import copy
import time

import torch
import torch.nn.functional as F
from torch import nn

from . import comfyui, teacher_pairs, training, worlds
from .training import WORK, log
from .worlds import Condition, World

SEED = 5000
# How often a batch goes in so many steps.
STEPS, SHARES = (1, 2, 3, 4), (0.5, 0.2, 0.1, 0.2)
BETA = 0.2  # where the loss of the pairs turns from squares to absolute values
PULL = 1.0  # weight of the distribution matching beside the pairs' loss
LOWEST, HIGHEST = 20, 980  # levels of noise at which the two answers are compared
RATE, ADAM_RATE = 0.003, 3e-4


def took(given: Condition, chosen: torch.Tensor) -> Condition:
    """The condition of some of the prompts."""
    return tuple(each[chosen] for each in given)


def student_step(
    world: World, student: nn.Module, noise: torch.Tensor, given: Condition, generator: torch.Generator
) -> torch.Tensor:
    """What the student takes for clean [B,C,h,w] after some of its own steps; only the last one has a gradient."""
    count = STEPS[int(torch.multinomial(torch.tensor(SHARES), 1, generator=generator))]
    last = int(torch.randint(count, (1,), generator=generator))
    path, x = worlds.levels(count), noise
    with torch.no_grad():
        for now, then in zip(path[:last], path[1 : last + 1], strict=True):
            clean, seen = world.answer(student, x, torch.full((len(x),), now), given)
            x = world.signal[then] * clean + world.noise[then] * seen
    return world.answer(student, x, torch.full((len(x),), path[last]), given)[0]


def noised(world: World, clean: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """(latents with noise, their levels, the noise)."""
    level = torch.randint(LOWEST, HIGHEST + 1, (len(clean),), generator=generator)
    noise = torch.randn(clean.shape, generator=generator)
    return world.mixed(clean, noise, level), level, noise


def matching_loss(
    world: World, mimic: nn.Module, clean: torch.Tensor, given: Condition, empty: Condition, generator: torch.Generator
) -> torch.Tensor:
    """A loss whose gradient leads from what the mimic makes of noised student latents to what the teacher does."""
    with torch.no_grad():
        x, level, _ = noised(world, clean, generator)
        both = tuple(torch.cat([a, b.expand_as(a)]) for a, b in zip(given, empty, strict=True))
        told, without = world.answer(world.network, torch.cat([x, x]), torch.cat([level, level]), both)[0].chunk(2)
        wanted = without + world.guidance * (told - without)
        made = world.answer(mimic, x, level, given)[0]
        size = (clean - wanted).abs().mean((1, 2, 3), keepdim=True).clamp(min=0.05)
        target = clean - (made - wanted) / size
    return 0.5 * (clean - target).square().mean()


def mimic_loss(
    world: World, mimic: nn.Module, clean: torch.Tensor, given: Condition, generator: torch.Generator
) -> torch.Tensor:
    """How far the mimic is from seeing the noise in the student's latents."""
    x, level, noise = noised(world, clean, generator)
    return world.error(world.answer(mimic, x, level, given), clean, noise)


class Learner:
    """A network with its optimiser."""

    def __init__(self, world: World) -> None:
        self.network = copy.deepcopy(world.network).train().requires_grad_(True)
        matrices, rest = world.split_parameters(self.network)
        self.optimiser = training.Muon(matrices, rest, RATE, ADAM_RATE, precision=torch.bfloat16)

    def learn(self, loss: torch.Tensor, factor: float) -> float:
        """One step."""
        loss.backward()
        self.optimiser.step(factor)
        return float(loss.detach())


def main(arguments: list[str]) -> None:
    """Train; student_<world>.pt (averaged weights) is rewritten once a minute."""
    parser = argparse.ArgumentParser(prog="run.py student")
    parser.add_argument("world", choices=tuple(worlds.LOADERS))
    parser.add_argument("--pairs", type=int, default=1_792)
    parser.add_argument("--steps", type=int, default=1_000)
    parser.add_argument("--match-from", type=int, default=400, help="the step from which the teacher's score pulls")
    parser.add_argument("--batch", type=int, default=32, help="samples per process")
    parser.add_argument("--decay-from", type=float, default=0.6, help="share of the steps at full rate")
    parser.add_argument("--until", type=int, default=None, help="stop after so many steps, to go on another time")
    options = parser.parse_args(arguments)
    last = training.stopping_point(options)
    training.start()
    comfyui.prepare()
    world, name = teacher_pairs.load_teacher(options.world), f"student_{options.world}"
    latents, seeds = teacher_pairs.load(options.world, options.pairs)
    rows = world.rows([*teacher_pairs.captions_of(options.pairs), ""])
    empty = world.given(rows[-1:])
    student, mimic = Learner(world), Learner(world)
    average = training.Average(student.optimiser.parameters, decay=0.998)
    keeper = training.Keeper(name, {
        "student": student.network, "optimiser": student.optimiser, "average": average,
        "mimic": mimic.network, "mimic_optimiser": mimic.optimiser,
    })  # fmt: skip
    first, began, sums = keeper.resume(), time.time(), torch.zeros(3)
    for step in range(first, last):
        generator = training.step_generator(SEED, step)
        chosen = torch.randint(len(latents), (options.batch,), generator=generator)
        with torch.no_grad():
            given, noise = world.given(rows[chosen]), world.noise_of(seeds[chosen].tolist())
        factor = training.schedule(step, options.steps, warm_up=100, decay_from=options.decay_from)
        known = options.batch if step < options.match_from else options.batch // 2
        noise[known:] = torch.randn(noise[known:].shape, generator=generator)
        with world.precision():
            clean = student_step(world, student.network, noise, given, generator)
            loss, pull = F.smooth_l1_loss(clean[:known], latents[chosen[:known]], beta=BETA), torch.zeros(())
            if step >= options.match_from:
                pull = matching_loss(world, mimic.network, clean, given, empty, generator)
            made = clean.detach()
            student.learn(loss + PULL * pull, factor)
            average.update(step)
            if step >= options.match_from:
                sums[2] += mimic.learn(mimic_loss(world, mimic.network, made, given, generator), max(factor, 0.2))
        sums[:2] += torch.stack([loss, pull]).detach()
        if (step + 1) % 50 == 0:
            shown = "pairs {:.4f} pull {:.4f} mimic {:.4f}".format(*(sums / 50).tolist())
            log(step + 1, shown, f"{(step + 1 - first) / (time.time() - began):.2f} steps/s")
            sums.zero_()
        if keeper.save(step + 1, now=step + 1 == last):
            average.swap()
            torch.save({"network": student.network.state_dict(), "steps": step + 1}, WORK / f"{name}.pt")
            average.swap()
