"""Stage "scorer": train the CLIP-like text-image scorer on scenes and captions with hard negative captions.

Besides the contrastive loss, linear heads read the scene's attributes from the picture's features while training.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from . import comfyui, dataset, training, world
from .judge import HEADS
from .networks import token_ids
from .train_ae import picture_batch
from .train_encoders import Heads
from .training import RANK, WORK, log
from .vision_models import END_OF_TEXT, START_OF_TEXT, make_clip, normalise, pack_clip

SWAPS = ("background", "class", "color")


def identity_of(row: np.ndarray) -> tuple[world.Identity, str]:
    """Identity and background from a scene's nine labels."""

    def name(value: int, options: tuple[str, ...]) -> str:
        return options[value - 1] if value else ""

    idn = world.Identity(
        world.CLASSES[row[0]],
        list(world.COLORS)[row[1]],
        world.TONES[row[8]],
        world.TEXTURES[row[2]],
        name(row[4], world.PATTERN_COLORS),
        name(row[5], world.ANGLES),
        name(row[6], world.EMBLEM_SHAPES),
        name(row[7], world.EMBLEM_COLORS),
    )
    return idn, list(world.BACKGROUNDS)[row[3]]


def other_than(value: str, options: tuple[str, ...], rng: np.random.Generator) -> str:
    """Another option."""
    return str(rng.choice([option for option in options if option != value]))


def captions_of(row: np.ndarray, rng: np.random.Generator, words: tuple[str, ...] | None = None) -> list[str]:
    """The true caption and one wrong caption per swap; `words` as in world.caption, drawn at random when None."""
    idn, place = identity_of(row)
    if words is None:
        words = (
            world.MAIN_WORDS
            if rng.random() < 0.5
            else tuple({"color", "background"} | {word for word in world.ALL_WORDS if rng.random() < 0.6})
        )
    wrong = [
        (idn, other_than(place, tuple(world.BACKGROUNDS), rng)),
        (replace(idn, cls=other_than(idn.cls, world.CLASSES, rng)), place),
        (replace(idn, color=other_than(idn.color, tuple(world.COLORS), rng)), place),
    ]
    return [world.caption(who, where, words) for who, where in [(idn, place), *wrong]]


def text_inputs(tokenizer: object, captions: list[str]) -> dict[str, torch.Tensor]:
    """Token ids up to the longest caption, and the attention mask that hides the padding."""
    ids = token_ids(tokenizer, captions)
    length = int((ids != END_OF_TEXT).sum(1).max()) + 1
    ids = ids[:, :length]
    # The first end token belongs to the caption, the others are padding.
    mask = ((ids == END_OF_TEXT).cumsum(1) <= 1).long()
    return {"input_ids": ids, "attention_mask": mask}


def embeddings(
    model: nn.Module, pictures: torch.Tensor, texts: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Unit vectors of pictures [B,3,96,96] in 0..1 and of texts, and the pictures' features before their projection."""
    found = model.vision_model(pixel_values=normalise(pictures)).pooler_output
    read = model.text_projection(model.text_model(**texts).pooler_output)
    return F.normalize(model.visual_projection(found), dim=1), F.normalize(read, dim=1), found


@torch.no_grad()
def swap_accuracy(model: nn.Module, tokenizer: object, pictures: torch.Tensor, rows: np.ndarray) -> dict[str, float]:
    """Percent of pictures nearer to their true caption than to the one with a swapped word, by swap."""
    model.train(False)
    rng = np.random.default_rng(8)
    captions = [captions_of(row, rng, world.MAIN_WORDS) for row in rows]
    seen, read, _ = embeddings(model, pictures, text_inputs(tokenizer, [text for four in captions for text in four]))
    scores = (seen[:, None] * read.view(len(seen), 1 + len(SWAPS), -1)).sum(-1)
    return {name: 100 * float((scores[:, 0] > scores[:, 1 + i]).float().mean()) for i, name in enumerate(SWAPS)}


def main(arguments: list[str]) -> None:
    """Train and write clip.pt (token rows in use only)."""
    from transformers import CLIPTokenizer

    parser = argparse.ArgumentParser(prog="run.py scorer")
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--batch", type=int, default=32, help="pictures per process")
    options = parser.parse_args(arguments)
    training.start()
    tokenizer = CLIPTokenizer.from_pretrained(str(comfyui.tokenizer_path()))
    scenes, held = dataset.load("train"), dataset.load("held_out")
    check = picture_batch(held["images"], torch.arange(256))
    used = token_ids(tokenizer, scenes["captions"]).unique()
    torch.manual_seed(17)
    model, heads = make_clip(), Heads(96, tuple(HEADS.values()))
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and ".layers." in name]
    chosen = {id(p) for p in matrices}
    optimiser = training.Muon(
        matrices, [p for _, p in named if id(p) not in chosen] + list(heads.parameters()), rate=0.01, adam_rate=2e-3
    )
    keeper = training.Keeper("clip", {"model": model, "heads": heads, "optimiser": optimiser})
    first, began = keeper.resume(), time.time()
    for step in range(first, options.steps):
        model.train()
        generator = training.step_generator(17, step)
        rng = np.random.default_rng([9, step, RANK])
        picks = torch.randint(len(scenes["labels"]), (options.batch,), generator=generator)
        captions = [captions_of(scenes["labels"][i], rng) for i in picks.tolist()]
        texts = [four[0] for four in captions] + [text for four in captions for text in four[1:]]
        seen, read, found = embeddings(model, picture_batch(scenes["images"], picks), text_inputs(tokenizer, texts))
        scores = model.logit_scale.exp().clamp(max=50) * seen @ read.T
        wanted = torch.arange(len(seen))
        loss = F.cross_entropy(scores, wanted) + F.cross_entropy(scores[:, : len(seen)].T, wanted)
        loss = loss + heads.loss(found, torch.tensor(scenes["labels"][picks.numpy()]))
        loss.backward()
        optimiser.step(training.schedule(step, options.steps, warm_up=40, decay_from=0.3), clip=5.0)
        if (step + 1) % 100 == 0:
            log(
                step + 1,
                f"loss {loss.item():.3f}",
                f"{(step + 1 - first) / (time.time() - began):.2f} steps/s",
                swap_accuracy(model, tokenizer, check, held["labels"][:256]) if RANK == 0 else "",
            )
        keeper.save(step + 1, now=step + 1 == options.steps)
    if RANK == 0:
        kept = torch.tensor(sorted({START_OF_TEXT, END_OF_TEXT, *used.tolist()}))
        torch.save(pack_clip(model.state_dict(), kept), WORK / "clip.pt")
