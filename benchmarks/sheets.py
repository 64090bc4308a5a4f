"""Draws a contact sheet for each method: the photo of a few held-out subjects, the images without and with the method,
and under each its prompt and its scores, to the photo and to the prompt. Trainings in the folder --runs are taken from
there.

    python toolbox/_load.py benchmarks.sheets --runs RUNS
    python toolbox/_load.py benchmarks.sheets --only sine hifi --runs RUNS --subjects 3
    python toolbox/_load.py benchmarks.sheets --only ezigen --harder
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ..core.prompt.conditioning import apply_embedding
from . import effect_ezigen, effect_hiper, effect_sine, effect_siso, frame, subjects, table2_hifi
from .plot import GAP
from .subjects import SIDE

DOCS = Path(__file__).resolve().parents[1] / "docs" / "images"
WIDE, LINE, QUALITY = 2 * SIDE, 14, 88
Tile = tuple[str, str, Any]  # title, prompt and image [1, 3, 96, 96]; first of all the photo, without a prompt


def photo(image: Any) -> Tile:
    """A source image [1, 96, 96, 3]."""
    return "photo", "", image.movedim(-1, 1)


def hiper(bench: effect_hiper.Bench, case: subjects.Case) -> Iterator[Tile]:
    """The edit prompt alone and with the subject."""
    prompt, steps = case.prompt(case.target_place), bench.settings.steps
    alone = bench.conditioning(prompt)
    embedding = bench.train(case, bench.settings.tokens, steps // 10)  # as best_step, whose runs serve here
    learned = apply_embedding(alone, embedding.at(steps), bench.settings.scale)
    yield photo(bench.image(case))
    for title, positive in (("prompt alone", alone), ("with the subject", learned)):
        yield title, prompt, bench.sampled(bench.world.model, positive, case.seed, bench.settings, 1)


def sine(bench: effect_sine.Bench, edit: effect_sine.Edit) -> Iterator[Tile]:
    """The edit by the base model alone, by the fine-tuned one alone, and guided (the paper's Fig. 6)."""
    tuned = bench.tune(edit)
    yield photo(bench.image(edit.case))
    models = {"base model alone": bench.world.model, "fine-tuned alone": tuned, "guided": bench.guided(edit, tuned)}
    for title, model in models.items():
        yield title, edit.prompt, bench.images(model, edit, edit.prompt)[:1]


def hifi(bench: table2_hifi.Bench, case: subjects.Case) -> Iterator[Tile]:
    """The class alone, with step-wise tokens, and with the reference too."""
    prompt, model = case.class_prompt(case.target_place), bench.world.model
    alone = bench.conditioning(prompt)
    tokens = bench.refined(case, bench.embedding(case, True, bench.settings.anchor_weight))
    learned = apply_embedding(alone, tokens.at(0), bench.settings.scale, tokens.windows)
    images = bench.images(case, model, learned)[:1]
    yield photo(bench.sources(case)[:1])
    yield "prompt alone", prompt, bench.images(case, model, alone)[:1]
    yield "step-wise tokens", prompt, images
    yield "with the reference", prompt, bench.guided(case, model, learned, images)


def ezigen(bench: effect_ezigen.Bench, case: subjects.Case) -> Iterator[Tile]:
    """The prompt alone, with the adapter, and after three loops."""
    prompt, subject = case.prompt(case.target_place), bench.subject(case)
    how = {"sampler": effect_ezigen.SAMPLER, "scheduler": effect_ezigen.SCHEDULER}
    found = bench.images(case, subject, effect_ezigen.RATIO, bench.settings.loops, **how)
    yield photo(bench.image(case))
    for title, images in zip(
        ("prompt alone", "adapter", "adapter, three loops"),
        (bench.by_stock_sampler(case), found[0], found[-1]),
        strict=True,
    ):
        yield title, prompt, images[:1]


def siso(bench: effect_siso.Bench, case: subjects.Case) -> Iterator[Tile]:
    """The plain prompt without and with the LoRA, and another prompt from other noise."""
    trained = effect_siso.Trained(case, effect_siso.NEW)
    lora = bench.optimised(trained).lora
    yield photo(bench.image(case))
    for again, name in ((True, "prompt"), (False, "other prompt, noise")):
        prompt = case.class_prompt(trained.place(not again))
        for weights, title in ((None, f"{name} alone"), (lora, f"{name}, LoRA")):
            yield title, prompt, bench.reused(trained, weights, others=not again, again=again)[:1]


METHODS: dict[str, tuple[Callable[[Path], Any], Callable[..., list[Any]], Callable[..., Iterator[Tile]]]] = {
    "hiper": (lambda _: effect_hiper.Bench(effect_hiper.Settings()), subjects.cases, hiper),
    "sine": (lambda _: effect_sine.Bench(effect_sine.Settings()), effect_sine.edits, sine),
    "hifi": (lambda _: table2_hifi.Bench(table2_hifi.Settings()), subjects.cases, hifi),
    "ezigen": (
        lambda _: effect_ezigen.Bench(
            Path(str(effect_ezigen.ADAPTER["--adapter"]["default"])), effect_ezigen.Settings()
        ),
        effect_ezigen.cases,
        ezigen,
    ),
    "siso": (lambda base: effect_siso.Bench(base, effect_siso.WORLDS["turbo"], "turbo"), subjects.cases, siso),
}


def lines(bench: subjects.Bench, tile: Tile, source: Any, encoder: Any) -> list[str]:
    """The title of a tile, its prompt and its scores; identity by the encoder for such subjects."""
    title, prompt, image = tile
    if not prompt:
        return [title]
    one, other = bench.looks(torch.cat([source, image]), encoder)
    return [title, prompt, f"identity {float(one @ other):.2f}, text {bench.text(prompt, image):.2f}"]


def sheet(bench: subjects.Bench, rows: list[list[Tile]], encoder: Any = None) -> Any:
    """A row of tiles for each subject."""
    from PIL import Image, ImageDraw

    high, columns = WIDE + 3 * LINE + GAP // 2, len(rows[0])
    canvas = Image.new("RGB", (columns * (WIDE + GAP) + GAP, len(rows) * high + GAP), "white")
    draw = ImageDraw.Draw(canvas)
    for row, tiles in enumerate(rows):
        for column, tile in enumerate(tiles):
            x, y = GAP + column * (WIDE + GAP), GAP // 2 + row * high
            array = (tile[2][0].movedim(0, -1) * 255).round().to(torch.uint8).numpy()
            canvas.paste(Image.fromarray(array).resize((WIDE, WIDE), Image.Resampling.NEAREST), (x, y))
            for number, line in enumerate(lines(bench, tile, tiles[0][2], encoder)):
                draw.text((x, y + WIDE + 2 + number * LINE), line, fill=0)
    return canvas


def main(arguments: list[str]) -> int:
    """Draw them into docs/images."""
    chosen = {"--only": {"nargs": "+", "choices": tuple(METHODS), "default": tuple(METHODS)}}
    run = frame.Run("sheets", arguments, None, chosen, subjects=4)
    harder = run.options.harder
    for name in run.options.only:
        make, cases, tiles = METHODS[name]
        bench = make(run.base)
        rows = [list(tiles(bench, case)) for case in run.chosen(cases)]
        drawn = sheet(bench, rows, bench.fine if harder else None)
        path = DOCS / f"sheet_{name}{'_harder' if harder else ''}.jpg"
        drawn.save(path, quality=QUALITY)
        frame.say(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")
    return 0
