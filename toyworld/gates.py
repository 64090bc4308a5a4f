"""Stage "gates": what the judge reads from samples of the 96 held-out prompts, of either world or student; and whether
the encoder for harder subjects knows near twins apart, beside the first world's.

`run.py gates` looks at all of them, `run.py gates flow turbo` at some; with --work the networks in training are taken
from the work folder instead of the committed ones.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from torch import nn

from . import assets, comfyui, dataset, export, worlds
from .measure import Table, encoder_rows, measure_samples
from .train_ae import picture_batch, psnr, reconstruct
from .vision_models import load_model
from .widen import part_of

TEACHER_STEPS, STUDENT_STEPS = 25, (1, 2, 4)
SCENES = 512
NAMES = (*worlds.LOADERS, *export.STUDENTS, "fine")


@dataclass
class Sampler:
    """A network of a world with its way to sample."""

    world: worlds.World
    network: nn.Module
    steps: int
    guidance: float

    @torch.no_grad()
    def pictures(self, prompts: list[str], seed: int) -> torch.Tensor:
        """Samples [N,3,96,96] in 0..1; every prompt has noise of its own."""
        empty, made = self.world.given(self.world.rows([""])), []
        for start in range(0, len(prompts), 48):
            given = self.world.given(self.world.rows(prompts[start : start + 48]))
            noise = self.world.noise_of([seed * 1_000_000 + start + i for i in range(len(given[0]))])
            made.append(worlds.sample(self.world, self.network, noise, given, self.steps, self.guidance, empty))
        return self.world.decoded(torch.cat(made))


def load(name: str, from_work: bool) -> tuple[worlds.World, nn.Module]:
    """(world, network) of a committed generator or student, or of the one in training."""
    owner = export.STUDENTS.get(name, name)
    flow_in_work = from_work and owner == "flow"
    world = worlds.load_flow_world(tensors=export.flow_tensors()) if flow_in_work else worlds.LOADERS[owner]()
    if name in export.STUDENTS:
        own = export.student_tensors(owner) if from_work else assets.read(name)
        world.network.load_state_dict(part_of(own, "network."), strict=False)
    return world, world.network.float()


def main(arguments: list[str]) -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(prog="run.py gates")
    parser.add_argument("names", nargs="*", metavar="name", help=f"some of {', '.join(NAMES)}; all if there is none")
    parser.add_argument("--work", action="store_true", help="from the work folder instead of the assets")
    parser.add_argument("--sheet", default=None, help="write contact sheets of the samples beside this file name")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    if unknown := set(options.names).difference(NAMES):
        parser.error(f"there is no {', '.join(sorted(unknown))} among {', '.join(NAMES)}")
    torch.set_num_threads(options.threads)
    comfyui.prepare()
    table = Table()
    for name in options.names or NAMES:
        rows_of(name, table, options.work, options.sheet)


def rows_of(name: str, table: Table, from_work: bool, sheet: str | None) -> None:
    """One part per number of steps."""
    if name == "fine":
        fine = load_model("fine", state=export.tensors_of("fine") if from_work else None)
        encoder_rows(table, {"fine": fine, "measure": load_model("measure")}, "fine", {"all": ">= 0.9"})
        return
    world, network = load(name, from_work)
    if name == "flow":
        scenes = picture_batch(dataset.render_scenes(SCENES, True, processes=1)["images"], torch.arange(SCENES))
        again = reconstruct(world.encoder, world.decoder, scenes)
        table.row(f"autoencoder, {SCENES} held-out scenes", f"{psnr(again, scenes):.2f} dB", "", ">= 27 dB")
    student = name in export.STUDENTS
    for steps in STUDENT_STEPS if student else (TEACHER_STEPS,):
        table.row(f"**{name}, {steps} steps**", "")
        measure_samples(table, Sampler(world, network, steps, 1.0 if student else world.guidance), sheet)
