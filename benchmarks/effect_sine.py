"""Does SINE's guidance edit a picture, and is it still that picture? On the small world, counted.

For each held-out subject one picture is rendered and a copy of the model is fine-tuned on it by the pack's own code,
under "a photo of a sks <class>". The edit asks for another texture, "a photo of a spotted <class>". From the same noise
pictures are sampled by the base model alone, with the tuned model's guidance, and by the tuned model alone, whose
training prompt is replaced by the edit prompt.

- Reached: the judge sees the asked texture, on the class.
- Identity: the measuring encoder's cosine between the judge's subject crops on white and the source picture's.
- Layout: IoU of the judge's subject mask and the source picture's.
- Distance: to the source picture, over the measuring encoder's feature maps of whole pictures, as LPIPS compares them.
- Text: the scorer's cosine with the edit prompt.

The narrow form of the small world is used: the same function as the checkpoint, at a fraction of the cost.

    python toolbox/_load.py benchmarks.effect_sine --out benchmarks/results/effect_sine.json
    python toolbox/_load.py benchmarks.effect_sine --steps 400 --learning-rate 3e-3 \
        --out benchmarks/results/effect_sine_shorter.json --sweep benchmarks/results/sweep_sine.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import effect_hiper, hosting

SAMPLES, SAMPLING_STEPS, CFG, SIDE = 4, 20, 4.0, 96
V, K = 0.7, 400
VS, KS = (0.0, 0.2, 0.4, 0.55, 0.7, 0.85, 1.0), (0, 200, 400, 600, 800, 1000)
LOST_GATE, ALONE_GATE, SPEARMAN_GATE = 0.10, 0.5, 0.8
SCORES = ("reached", "identity", "layout", "distance", "text")


@dataclass(frozen=True)
class Training:
    """How the copy is tuned. The default is the small world's, which has few weights; SD1.x wants a lower rate."""

    method: str
    steps: int
    learning_rate: float
    patches: bool = False
    whole_image: float = 0.0  # probability of the whole picture instead of a patch
    prior_weight: float = 0.0


TUNING = Training("LoRA", 500, 5e-3)


@dataclass(frozen=True)
class Edit:
    """A held-out subject in its place, and the texture that it shall have instead."""

    case: effect_hiper.Case
    texture: str

    @property
    def class_name(self) -> str:
        return self.case.identity.cls

    @property
    def prompt(self) -> str:
        return f"a photo of a {self.texture} {self.class_name}"

    @property
    def training_prompt(self) -> str:
        return f"a photo of a sks {self.class_name}"


def edits(count: int) -> list[Edit]:
    """The first `count` held-out subjects, each with a pattern that it does not have."""
    found = []
    for index, case in enumerate(effect_hiper.cases(count)):
        others = [name for name in ("striped", "spotted", "checkered") if name != case.identity.texture]
        found.append(Edit(case, others[index % len(others)]))
    return found


class Bench(effect_hiper.Bench):
    """The small world's models and measures, and the pack's own fine-tuning, guidance and sampling on them."""

    def tune(self, edit: Edit, training: Training, steps: int | None = None) -> Any:
        """The tuned MODEL."""
        import torch

        from ..core.sine.fine_tune import FineTuneSettings
        from ..core.sine.host.crops import Cutting
        from ..core.sine.host.fine_tune import Plan, PriorImages, fine_tune

        cutting = Cutting(SIDE)
        if training.patches:
            cutting = Cutting(SIDE, 2 * SIDE // 8, whole_image=training.whole_image)
        prompt = edit.training_prompt
        prior = None
        if training.prior_weight:
            of_class = f"a photo of a {edit.class_name}"
            pictures = self.pictures(self.world.model, edit, of_class, seed=edit.case.seed + 1)
            prior = PriorImages(pictures.movedim(1, -1), of_class, self.conditioning(of_class))
        with torch.inference_mode():
            return fine_tune(
                self.world.model,
                self.world.vae,
                FineTuneData(self.picture(edit.case), prompt, positive=self.conditioning(prompt)),
                Plan(cutting, training.method, steps or training.steps),
                FineTuneSettings(training.learning_rate, edit.case.seed, prior_weight=training.prior_weight),
                prior,
            )[0]

    def guided(self, edit: Edit, tuned: Any, v: float, k: int, prompt: str | None = None) -> Any:
        """The base MODEL under a tuned one's guidance."""
        from ..core.sine.host.guidance import guided, subject_model

        positive = self.conditioning(prompt or edit.training_prompt)
        return guided(self.world.model, [subject_model(tuned, positive, 1 - v, 0.0, 1.0, k)])

    def pictures(
        self, model: Any, edit: Edit, prompt: str, seed: int | None = None, width: int = SIDE, count: int = SAMPLES
    ) -> Any:
        """Pictures [count, 3, 96, width] of a prompt, by default from the subject's own noise."""
        import comfy.sample
        import torch

        seed = edit.case.seed if seed is None else seed
        shape = (count, 4, SIDE // 8, width // 8)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        with torch.inference_mode():
            latents = comfy.sample.sample(
                model, noise, SAMPLING_STEPS, CFG, "euler", "ddim_uniform", self.conditioning(prompt),
                self.conditioning(""), torch.zeros(shape), disable_pbar=True, seed=seed,
            )  # fmt: skip
            return self.world.vae.decode(latents).movedim(-1, 1)

    def scored(self, edit: Edit, pictures: Any) -> dict[str, float]:
        """The five scores, each a mean over the pictures."""
        import torch

        from ..toyworld import world

        with torch.inference_mode():
            source = self.picture(edit.case).movedim(-1, 1)
            found = self.judge.attributes(pictures)
            reached = (found["texture"] == world.TEXTURES.index(edit.texture)) & (
                found["class"] == world.CLASSES.index(edit.class_name)
            )
            own, *others = self.judge.mask(torch.cat([source, pictures])) > 0.5
            overlap = [float((own & mask).sum() / (own | mask).sum()) for mask in others]
            return {
                "reached": float(reached.float().mean()),
                "identity": self.identity(edit.case, pictures),
                "layout": sum(overlap) / len(overlap),
                "distance": self.distance(source, pictures),
                "text": self.text(edit.prompt, pictures),
            }

    def distance(self, source: Any, pictures: Any) -> float:
        """Mean distance of whole pictures to the source, over all feature maps alike."""
        from ..core.vision.measures import lpips
        from ..toyworld.vision_models import normalise

        one, others = (
            self.measure(normalise(each), output_hidden_states=True).hidden_states for each in (source, pictures)
        )
        heads = [level.new_full((level.shape[1],), 1 / len(one)) for level in one]
        return float(lpips(others, one, heads).mean())

    def edited_render(self, edit: Edit) -> Any:
        """A real render of what the edit asks for: the same subject, pose and place with the other pattern."""
        import torch

        from ..toyworld import world

        other = replace(edit.case.identity, texture=edit.texture, pattern_color="white", angle="vertical")
        pixels, _ = world.render(world.make_identity(**vars(other)), edit.case.source_place, edit.case.seed)
        return torch.from_numpy(pixels)[None].movedim(-1, 1).float() / 255


def setting(v: float, k: int) -> str:
    """The name of a guided result in a row."""
    return f"v {v:g}, K {k}"


def row_of(bench: Bench, edit: Edit, training: Training, swept: bool) -> dict[str, dict[str, float]]:
    """One subject: base alone, tuned alone (in a plain sampler), the tuned model in the guidance's place from the edit
    prompt (v = 0 throughout), two references, and guided, if wanted over K and v. v = 1 and K = 1000 are the base
    alone.
    """
    base = bench.world.model
    tuned = bench.tune(edit, training)
    row = {
        "base": bench.scored(edit, bench.pictures(base, edit, edit.prompt)),
        "tuned alone": bench.scored(edit, bench.pictures(tuned, edit, edit.prompt)),
        "tuned, v = 0": bench.scored(
            edit, bench.pictures(bench.guided(edit, tuned, 0.0, 0, edit.prompt), edit, edit.prompt)
        ),
        "tuned, own prompt": bench.scored(edit, bench.pictures(tuned, edit, edit.training_prompt)),
        "real edited render": bench.scored(edit, bench.edited_render(edit)),
    }
    for v, k in [*((V, k) for k in KS), *((v, K) for v in VS if v != V)] if swept else [(V, K)]:
        if v == 1.0 or k == 1000:
            row[setting(v, k)] = row["base"]
        else:
            row[setting(v, k)] = bench.scored(edit, bench.pictures(bench.guided(edit, tuned, v, k), edit, edit.prompt))
    return row


def means(rows: list[dict], kind: str) -> dict[str, float]:
    """Each score of one kind of pictures, over all subjects."""
    return {score: sum(row[kind][score] for row in rows) / len(rows) for score in SCORES}


def effect(rows: list[dict]) -> dict[str, Any]:
    """Means, paired intervals of guided over base, and what the gates ask."""
    from ..core.vision.measures import paired_interval

    guided = setting(V, K)
    kinds = {
        "guided": guided,
        **{name: name for name in rows[0] if name not in ("subject", guided) and "K" not in name},
    }
    mean = {name: means(rows, kind) for name, kind in kinds.items()}
    gain = {score: paired_interval([row[guided][score] - row["base"][score] for row in rows]) for score in SCORES}
    gates = {
        "reaches the target": mean["guided"]["reached"] >= mean["base"]["reached"] - LOST_GATE,
        "keeps identity better": gain["identity"].low > 0,
        "keeps layout better": gain["layout"].low > 0,
        "nearer to the source": gain["distance"].high < 0,
        "tuned alone reaches it half as often": mean["tuned alone"]["reached"]
        <= ALONE_GATE * mean["guided"]["reached"],
    }
    return {
        "subjects": len(rows),
        "mean": mean,
        "guided minus base": {score: vars(interval) for score, interval in gain.items()},
        "gates": gates,
        "gates held": all(gates.values()),
    }


def ranks(values: list[float]) -> Any:
    """Rank of each value, equal ones share the mean of theirs."""
    import torch

    numbers = torch.tensor(values, dtype=torch.float64)
    return torch.stack([(numbers < x).sum() + ((numbers == x).sum() - 1) / 2 for x in numbers])


def spearman(one: list[float], other: list[float]) -> float:
    """Correlation of the ranks."""
    import torch

    return float(torch.corrcoef(torch.stack([ranks(one), ranks(other)]).double())[0, 1])


def sweep(rows: list[dict]) -> dict[str, Any]:
    """Mean curves over K and v, and their rank correlations."""
    over_k = [{"K": k, **means(rows, setting(V, k))} for k in KS]
    over_v = [{"v": v, **means(rows, setting(v, K))} for v in VS]
    rises = {
        "distance over K": spearman(list(KS), [point["distance"] for point in over_k]),
        "text over K": spearman(list(KS), [point["text"] for point in over_k]),
        "text over v": spearman(list(VS), [point["text"] for point in over_v]),
    }
    return {
        "subjects": len(rows),
        "over K": over_k,
        "over v": over_v,
        "spearman": rises,
        "v nearest to the source": min(over_v, key=lambda point: point["distance"])["v"],
        "gates held": all(value >= SPEARMAN_GATE for value in rises.values()),
    }


def stored(chosen: list[Edit], path: Path | None, row_of: Callable[[Edit], dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each subject; each is stored as soon as it is there, and taken from there later."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path and path.exists() else []
    for edit in chosen[len(rows) :]:
        made = row_of(edit)
        words = " ".join(word for word in vars(edit.case.identity).values() if word)
        rows.append({"subject": f"{words}, {edit.case.source_place}: {edit.texture}", **made})
        if path:
            with path.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
        shown = {name: " ".join(f"{value:.2f}" for value in scores.values()) for name, scores in made.items()}
        sys.stdout.write(f"{len(rows):3d} {rows[-1]['subject']}: {shown}\n")
        sys.stdout.flush()
    return rows[: len(chosen)]


def write(path: Path | None, result: dict[str, Any]) -> None:
    """As JSON, where a path was given."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")


def main(arguments: list[str]) -> int:
    """Print and write the figures; exit 1 when a gate is missed."""
    parser = argparse.ArgumentParser(prog="benchmarks.effect_sine")
    parser.add_argument("--subjects", type=int, default=16)
    parser.add_argument("--method", choices=["LoRA", "full weights"], default=TUNING.method)
    parser.add_argument("--steps", type=int, default=TUNING.steps)
    parser.add_argument("--learning-rate", type=float, default=TUNING.learning_rate)
    parser.add_argument("--prior-weight", type=float, default=0.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=Path, help="store each subject's figures here, and go on from them")
    parser.add_argument("--out", type=Path, help="write the effect as JSON")
    parser.add_argument("--sweep", type=Path, help="vary K and v too, write the curves as JSON")
    options = parser.parse_args(arguments)
    hosting.start(options.threads)
    training = Training(options.method, options.steps, options.learning_rate, prior_weight=options.prior_weight)
    settings = {"cfg": CFG, "samples": SAMPLES, "sampling_steps": SAMPLING_STEPS, "v": V, "K": K}
    settings = {**vars(training), **settings}
    bench, swept = Bench(), options.sweep is not None
    rows = stored(edits(options.subjects), options.rows, lambda edit: row_of(bench, edit, training, swept))
    parts = [effect(rows), *([sweep(rows)] if swept else [])]
    for part in parts:
        sys.stdout.write(json.dumps(part, indent=1) + "\n")
    write(options.out, {"settings": settings, "summary": parts[0], "rows": rows})
    if swept:
        write(options.sweep, {"settings": settings, **parts[1]})
    return int(not all(part["gates held"] for part in parts))
