"""Does EZIGen's adapter bring the subject along, and does the image still obey? On toyworld, counted.

The adapter was trained on pairs of images of other subjects (toyworld/pairs.py). For each held-out subject one image is
rendered, cut out by the judge's mask and encoded by the pack's own code; images of the subject in another place are
then sampled from the same noise by the prompt alone, and with the adapter in the last part of the steps, at once and
after some loops at exact noise level; the curve over that part shows what it trades.

    python toolbox/_load.py benchmarks.effect_ezigen --out benchmarks/results/effect_ezigen.json
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..core.ezigen.artifact import read_adapter
from ..core.ezigen.staged import Loops
from ..toyworld import fine, world
from ..toyworld.assets import ASSETS
from ..toyworld.pairs import subject_prompt
from ..toyworld.subjects import for_checking
from . import frame, subjects
from .subjects import SIDE, Case

SAMPLER, SCHEDULER = "ddpm", "ddim_uniform"
RATIO, MARGIN = 0.4, 0.06
WON_GATE, TEXT_GATE, CURVE_GATE = 0.75, 0.05, 0.9
ADAPTER = {"--adapter": {"type": Path, "default": ASSETS / "adapter.safetensors", "help": "in the narrow form"}}


@dataclass(frozen=True)
class Settings:
    """ratios: the parts of the steps, counted from the end, in which the adapter is on; loops: at RATIO."""

    ratios: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8, 1.0)
    loops: int = 3
    cfg: float = 4.0
    samples: int = 4
    steps: int = 20


def cases(count: int, harder: bool = False) -> list[Case]:
    """The first `count` held-out subjects; only such that no training has seen. harder: with fine parts."""
    found, draw = [], fine.identity if harder else world.identity
    for index, case in enumerate(subjects.cases(2 * count)):
        key, first = (case.identity.cls, case.identity.color, case.identity.texture), 830_000 + 1000 * index
        kept = (seed for seed in range(first, first + 1000) if for_checking(world.identity(seed, *key)))
        seed = next(kept, None)  # a plain subject may have no variant that was kept
        if seed is not None:
            found.append(replace(case, identity=draw(seed, *key)))
    return found[:count]


class Bench(subjects.Bench):
    """The pack's own encoding, adapter and sampling on toyworld."""

    def __init__(self, adapter: Path, settings: Any) -> None:
        super().__init__()
        self.adapter, self.settings = read_adapter(adapter), settings

    @torch.inference_mode()
    def subject(self, case: Case) -> Any:
        """The subject's one image, cut out and encoded."""
        from ..core.ezigen.host.adapter import encode_subject, prepare_images

        image = self.image(case)
        ready = prepare_images(image, self.judge.mask(image.movedim(-1, 1)), SIDE, MARGIN)
        prompt = self.conditioning(subject_prompt(case.identity.cls))
        return encode_subject(self.world.model, self.world.vae, prompt, ready, case.seed)

    @torch.inference_mode()
    def images(
        self, case: Case, subject: Any, ratio: float, loops: int, start: Any = None, model: Any = None, **more: Any
    ) -> Any:
        """Images [N, 3, 96, 96] of the first sampling, or of `start`, and of each loop, by the pack's own stages."""
        from ..core.ezigen.host.staged import StagedSampling, sample_staged

        settings = case.seed, self.settings.steps, self.settings.cfg, ratio, Loops(loops, loops)
        prompts = self.conditioning(case.prompt(case.target_place)), self.conditioning("")
        size = torch.zeros(self.settings.samples, 4, SIDE // 8, SIDE // 8)
        start = None if start is None else start.movedim(1, -1)
        models = model or self.world.model, self.world.vae, self.adapter
        _, images, *_ = sample_staged(StagedSampling(*models, subject, *prompts, None, *settings, **more), size, start)
        return images.movedim(-1, 1).split(self.settings.samples)

    @torch.inference_mode()
    def by_stock_sampler(self, case: Case, subject: Any = None, ratio: float = 1.0) -> Any:
        """Images [N, 3, 96, 96] of the target prompt from the same noise, with the adapter if there is a subject."""
        import comfy.sample
        import comfy.samplers

        from ..core.ezigen.host.adapter import with_adapter
        from ..core.ezigen.host.staged import stock_noise

        model = self.world.model
        if subject is not None:
            model = with_adapter(model, self.adapter, subject, ratio)
        nothing = torch.zeros(self.settings.samples, 4, SIDE // 8, SIDE // 8)
        sampler, levels = comfy.samplers.sampler_object(SAMPLER), self.sigmas(self.settings.steps, SCHEDULER)
        target = self.conditioning(case.prompt(case.target_place))
        latents = comfy.sample.sample_custom(
            model, stock_noise(nothing, case.seed), self.settings.cfg, sampler, levels, target, self.conditioning(""),
            nothing, disable_pbar=True, seed=case.seed,
        )  # fmt: skip
        return self.decoded(latents)

    def row(self, case: Case) -> dict[str, Any]:
        """The prompt alone, the adapter in each part of the steps and, for RATIO, after each loop."""
        subject, loops = self.subject(case), self.settings.loops
        row = {"without": self.judged(case, self.by_stock_sampler(case)), "real render": self.control(case)}
        for ratio in self.settings.ratios:
            if ratio == RATIO:
                first, *others = self.images(case, subject, ratio, loops, sampler=SAMPLER, scheduler=SCHEDULER)
                row |= {f"loop {number + 1}": self.judged(case, each) for number, each in enumerate(others)}
            else:
                first = self.by_stock_sampler(case, subject, ratio)
            row[f"ratio {ratio:g}"] = self.judged(case, first)
        return row


def summary(rows: frame.Rows) -> dict[str, Any]:
    """Means of all, every way's paired gain over the prompt alone, and what is asked of the last loop (else of RATIO)
    and of the curve."""
    found: dict[str, Any] = {"subjects": len(rows), **frame.means(rows)}
    for kind in (kind for kind in frame.kinds_of(rows) if kind != "without"):
        found[kind]["gain"] = frame.gain(rows, kind, "without", "identity")
        found[kind]["text lost"] = 1 - found[kind]["text"] / found["without"]["text"]
    last = found[[f"ratio {RATIO:g}", *(kind for kind in found if kind.startswith("loop"))][-1]]
    gates = {
        "identity rises": last["gain"]["low"] > 0,
        "share won": last["gain"]["share_won"] >= WON_GATE,
        "text stays": last["text lost"] <= TEXT_GATE,
    }
    ratios = {0.0: "without", **{float(kind.split()[1]): kind for kind in found if kind.startswith("ratio")}}
    if len(ratios) > 3:
        rise = {
            score: frame.spearman(list(ratios), [found[kind][score] for kind in ratios.values()])
            for score in ("identity", "text")
        }
        found["spearman"] = rise
        gates["identity rises with the ratio"] = rise["identity"] >= CURVE_GATE
        gates["text falls with the ratio"] = rise["text"] <= -CURVE_GATE
    return frame.gated(found, gates)


def main(arguments: list[str]) -> int:
    """Print and write the figures; exit 1 when a gate is missed."""
    run = frame.Run("effect_ezigen", arguments, Settings(), ADAPTER, subjects=24)
    rows = run.rows(run.chosen(cases), lambda: Bench(run.options.adapter, run.settings), Bench.row)
    return run.judged(rows, summary(rows))
