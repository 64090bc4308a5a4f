"""Stage "measure": every gate figure of the small world from the committed assets, real renders beside samples.

`python toyworld/run.py measure` renders held-out scenes anew, so it needs no training data; about four minutes on two
cores.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F

from . import assets, autoencoder, comfyui, evaluation, painting, subjects, world
from .dataset import render_scenes
from .judge import load_judge, subject_crop
from .networks import TextEncoder, make_unet, sample, token_ids
from .train_ae import picture_batch, psnr, reconstruct
from .train_encoders import auc, hard_auc
from .train_judge import mask_iou
from .train_scorer import SWAPS, swap_accuracy
from .vision_models import features, load_model
from .widen import as_stored, part_of

SAMPLE_SEEDS = (3, 11)


class Table:
    """Collects rows and prints them as they come."""

    def row(self, what: str, value: str, control: str = "", gate: str = "") -> None:
        """One figure, its real-render control and its gate."""
        sys.stdout.write(f"| {what} | {value} | {control} | {gate} |\n")
        sys.stdout.flush()


class Painter(Protocol):
    """Anything that makes pictures of prompts."""

    def pictures(self, prompts: list[str], seed: int) -> torch.Tensor:
        """Samples [N,3,96,96] in 0..1."""


class Generator:
    """The narrow generator outside ComfyUI: prompts -> pictures."""

    def __init__(self) -> None:
        from transformers import CLIPTokenizer

        stored = assets.read("generator")
        tensors = as_stored(stored)
        self.tokenizer = CLIPTokenizer.from_pretrained(str(comfyui.tokenizer_path()))
        self.unet, self.text = make_unet(), TextEncoder(stored["vocabulary"].tolist())
        self.encoder, self.decoder = autoencoder.make_encoder(), autoencoder.make_decoder()
        for name in ("unet", "text", "encoder", "decoder"):
            getattr(self, name).load_state_dict(part_of(tensors, name + "."))
            getattr(self, name).train(False).requires_grad_(False)
        self.shift, self.scale = float(tensors["latent.shift"]), float(tensors["latent.scale"])

    @torch.no_grad()
    def pictures(self, prompts: list[str], seed: int, guidance: float = 4.0) -> torch.Tensor:
        """DDIM samples [N,3,96,96] in 0..1: 25 steps."""
        context = self.text(self.text.rows_of(token_ids(self.tokenizer, [*prompts, ""])))
        latents = sample(self.unet, context[:-1], context[-1:], seed, guidance=guidance)
        return self.decoder(latents * self.scale + self.shift).clamp(0, 1)


def percent(value: float) -> str:
    """One decimal."""
    return f"{value:.1f} %"


def measure_judge(table: Table, generator: Generator, scenes: dict) -> None:
    """Autoencoder, judge heads and masks on held-out scenes."""
    count = len(scenes["labels"])
    pictures, labels = picture_batch(scenes["images"], torch.arange(count)), torch.from_numpy(scenes["labels"])
    masks = torch.from_numpy(scenes["masks"]).float() / 255
    again = reconstruct(generator.encoder, generator.decoder, pictures)
    judge = load_judge()
    table.row(f"autoencoder, {count} held-out scenes", f"{psnr(again, pictures):.2f} dB", "", ">= 27 dB")
    decoded, real = (evaluation.head_accuracy(judge, images, labels) for images in (again, pictures))
    for name in real:
        table.row(
            f"judge, {name} (autoencoder's pictures / real)",
            percent(decoded[name]),
            percent(real[name]),
            "real >= 95 %",
        )
    table.row(
        "judge, mask IoU (autoencoder's pictures / real)",
        f"{mask_iou(judge.mask(again), masks):.3f}",
        f"{mask_iou(judge.mask(pictures), masks):.3f}",
        "real >= 0.85",
    )


def measure_samples(table: Table, generator: Painter, sheet: str | None) -> None:
    """96 prompts of held-out combinations, two seeds, beside real renders of the same prompts."""
    judge = load_judge()
    identities, places, truth = evaluation.held_out_prompts()
    real, _ = evaluation.real_renders(identities, places)
    control = evaluation.accuracy(judge, real, truth)
    pairs = list(zip(identities, places, strict=True))
    gates = {"class": ">= 90 %", "color": ">= 95 %", "texture": ">= 80 %", "background": ">= 95 %"}
    for title, words in (("short", world.MAIN_WORDS), ("full", world.ALL_WORDS)):
        prompts = [world.caption(idn, place, words) for idn, place in pairs]
        made = [generator.pictures(prompts, seed) for seed in SAMPLE_SEEDS]
        found = [evaluation.accuracy(judge, pictures, truth) for pictures in made]
        for name in found[0]:
            each = " / ".join(percent(values[name]) for values in found)
            table.row(
                f"96 {title} prompts, {name}, seeds {SAMPLE_SEEDS}",
                f"{np.mean([values[name] for values in found]):.1f} % ({each})",
                percent(control[name]),
                gates.get(name, "") if title == "short" else "",
            )
        textures = evaluation.texture_table(judge, torch.cat(made), truth.repeat(len(made), 1))
        table.row(
            f"96 {title} prompts, by texture", ", ".join(f"{k} {percent(v)}" for k, v in textures.items()), "", ""
        )
        if title == "full":
            details = torch.tensor([evaluation.all_labels(idn, place) for idn, place in pairs])
            heads = [evaluation.head_accuracy(judge, pictures, details) for pictures in made]
            controls = evaluation.head_accuracy(judge, real, details)
            for name in list(controls)[4:]:
                table.row(
                    f"96 full prompts, {name}",
                    percent(float(np.mean([h[name] for h in heads]))),
                    percent(controls[name]),
                    "",
                )
        if sheet:
            stem = Path(sheet)
            picture = painting.contact_sheet(evaluation.to_uint8(made[0]), 12)
            picture.save(stem.with_name(f"{stem.stem}_{title}{stem.suffix}"), quality=88)


def encoder_rows(
    table: Table, models: dict[str, torch.nn.Module], kind: str, gates: dict[str, str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """AUC of identity encoders on unseen identities of a kind, by the judge's crops of renders and by perfect ones;
    returns the renders and their masks."""
    pictures, masks = subjects.check_scenes(120, kind)
    judge, of_kind = load_judge(), subjects.KINDS[kind]
    images = picture_batch(pictures, torch.arange(len(pictures)))
    truth = torch.from_numpy(masks).float() / 255
    shape = (-1, 1 + len(of_kind.changes), subjects.VIEWS, 3, world.SIZE, world.SIZE)
    seen = judge.mask(images)
    for name, model in models.items():
        results = [
            hard_auc(model, (subject_crop(images, mask, world.SIZE) * 255).byte().view(shape), of_kind)
            for mask in (seen, truth)
        ]
        for change in results[0]:
            table.row(
                f"{name} encoder, AUC against other {change} (judge's crop / true crop)",
                f"{results[0][change]:.3f}",
                f"{results[1][change]:.3f}",
                gates.get(change, ""),
            )
    return images, truth


def measure_encoders(table: Table) -> None:
    """AUC of the identity encoders."""
    models = {name: load_model(name) for name in ("dino", "measure")}
    images, truth = encoder_rows(table, models, "plain", {"pattern or emblem": ">= 0.95"})
    shape = (-1, 1 + len(subjects.PLAIN.changes), subjects.VIEWS)
    found = F.normalize(features(load_model("measure"), subject_crop(images, truth, world.SIZE)), dim=1)
    found = found.view(len(found) // (shape[1] * shape[2]), shape[1], shape[2], -1)[:, 0]
    other = (found[:, 0] * found[:, 1].roll(1, 0)).sum(-1)
    table.row(
        "measure encoder, AUC against any other subject", f"{auc((found[:, 0] * found[:, 1]).sum(-1), other):.3f}"
    )


def measure_scorer(table: Table, generator: Generator, scenes: dict) -> None:
    """The CLIP-like scorer: true caption against one with a swapped word."""
    pictures = picture_batch(scenes["images"], torch.arange(len(scenes["labels"])))
    found = swap_accuracy(load_model("clip"), generator.tokenizer, pictures, scenes["labels"])
    for name in SWAPS:
        table.row(
            f"scorer on real renders, true caption over one with another {name}", percent(found[name]), "(chance 50 %)"
        )


def main(arguments: list[str]) -> None:
    """Print the table; --sheet writes the sampled pictures."""
    parser = argparse.ArgumentParser(prog="run.py measure")
    parser.add_argument("--sheet", default=None, help="write contact sheets of the samples beside this file name")
    parser.add_argument("--scenes", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    comfyui.prepare()
    assets.check()
    table, generator = Table(), Generator()
    scenes = render_scenes(options.scenes, from_held_out=True, processes=1)
    table.row("what", "value", "control on real renders", "gate")
    table.row("---", "---", "---", "---")
    measure_judge(table, generator, scenes)
    measure_samples(table, generator, options.sheet)
    measure_encoders(table)
    measure_scorer(table, generator, scenes)
