"""Does SINE's guidance edit an image, and is it still that image? On toyworld, counted.

For each held-out subject one image is rendered and a copy of the model is fine-tuned on it by the pack's own code,
under "a photo of a sks <class>". The edit asks for another texture, "a photo of a spotted <class>". From the same noise
images are sampled by the base model alone, with the tuned model's guidance, and by the tuned model alone, whose
training prompt is replaced by the edit prompt.

- Reached: the judge sees the asked texture, on the class.
- Identity: the measuring encoder's cosine between the judge's subject crops on white and the source image's.
- Layout: IoU of the judge's subject mask and the source image's.
- Distance: to the source image, over the measuring encoder's feature maps of whole images, as LPIPS compares them.
- Text: the scorer's cosine with the edit prompt.

    python toolbox/_load.py benchmarks.effect_sine --out benchmarks/results/effect_sine.json
    python toolbox/_load.py benchmarks.effect_sine --steps 400 --learning-rate 3e-3 \
        --out benchmarks/results/effect_sine_shorter.json --sweep benchmarks/results/sweep_sine.json
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..core.sine.fine_tune import FineTuneSettings
from ..core.vision.measures import lpips
from ..toyworld import world
from ..toyworld.vision_models import normalise
from . import frame, subjects
from .subjects import SIDE, Case

VS, KS = (0.0, 0.2, 0.4, 0.55, 0.7, 0.85, 1.0), (0, 200, 400, 600, 800, 1000)
LOST_GATE, ALONE_GATE, SPEARMAN_GATE = 0.10, 0.5, 0.8
SCORES = ("reached", "identity", "layout", "distance", "text")


@dataclass(frozen=True)
class Settings:
    """How the copy is tuned, and the guidance. The rate is toyworld's, which has few weights; SD1.x wants a lower one.

    whole_image: probability of the whole image instead of a patch.
    """

    method: str = field(default="LoRA", metadata={"choices": ("LoRA", "full weights")})
    steps: int = 500
    learning_rate: float = 5e-3
    patches: bool = False
    whole_image: float = 0.0
    prior_weight: float = 0.0
    cfg: float = 4.0
    samples: int = 4
    sampling_steps: int = 20
    v: float = 0.7
    K: int = 400


WORLDS = {"unet": Settings(), "flow": Settings(K=600)}  # the flow's levels are shifted: more steps are above K


@dataclass(frozen=True)
class Edit:
    """A held-out subject in its place, and the texture that it shall have instead."""

    case: Case
    texture: str

    @property
    def seed(self) -> int:
        return self.case.seed

    @property
    def label(self) -> str:
        return f"{self.case.label}, {self.case.source_place}: {self.texture}"

    @property
    def prompt(self) -> str:
        return self.case.class_prompt(word=f"{self.texture} ")

    @property
    def training_prompt(self) -> str:
        return self.case.class_prompt(word="sks ")


def edits(count: int, harder: bool = False, seed: int = subjects.FIRST_SEED) -> list[Edit]:
    """The first `count` held-out subjects, each with a pattern that it does not have."""
    found = []
    for index, case in enumerate(subjects.cases(count, harder, seed)):
        others = [name for name in ("striped", "spotted", "checkered") if name != case.identity.texture]
        found.append(Edit(case, others[index % len(others)]))
    return found


class Bench(subjects.Bench):
    """The pack's own fine-tuning and guidance on toyworld."""

    def __init__(self, settings: Settings, world: str = subjects.NARROW[0]) -> None:
        super().__init__(world)
        self.settings = settings

    @torch.inference_mode()
    def tune(self, edit: Edit) -> Any:
        """The tuned MODEL."""
        from ..core.sine.host.crops import CropSettings
        from ..core.sine.host.fine_tune import FineTuneData, FineTunePlan, fine_tune

        how, prior = self.settings, None
        crop = CropSettings(SIDE, 2 * SIDE // 8, whole_image=how.whole_image) if how.patches else CropSettings(SIDE)
        if how.prior_weight:
            of_class = edit.case.class_prompt()
            images = self.images(self.world.model, edit, of_class, seed=edit.seed + 1)
            prior = FineTuneData(images.movedim(1, -1), of_class, positive=self.conditioning(of_class))
        return fine_tune(
            self.world.model,
            self.world.vae,
            FineTuneData(self.image(edit.case), edit.training_prompt, positive=self.conditioning(edit.training_prompt)),
            FineTunePlan(crop, how.method, how.steps),
            FineTuneSettings(how.learning_rate, edit.seed, prior_weight=how.prior_weight),
            prior,
        )[0]

    def guided(self, edit: Edit, tuned: Any, v: float | None = None, k: int | None = None, prompt: str = "") -> Any:
        """The base MODEL under a tuned one's guidance."""
        from ..core.sine.host.guidance import subject_model, with_guidance

        v, k = self.settings.v if v is None else v, self.settings.K if k is None else k
        positive = self.conditioning(prompt or edit.training_prompt)
        return with_guidance(self.world.model, [subject_model(tuned, positive, 1 - v, 1.0, k_timestep=k)])

    def images(self, model: Any, edit: Edit, prompt: str, seed: int | None = None, width: int = SIDE) -> Any:
        """Images [N, 3, 96, width] of a prompt, by default from the subject's own noise."""
        seed = edit.seed if seed is None else seed
        return self.sampled(model, self.conditioning(prompt), seed, self.settings, width=width)

    @torch.inference_mode()
    def scored(self, edit: Edit, images: Any) -> dict[str, float]:
        """The five scores, each a mean over the images."""
        source = self.image(edit.case).movedim(-1, 1)
        own, *others = self.mask(torch.cat([source, images])) > 0.5
        return {
            "reached": self.share_seen(images, texture=edit.texture, cls=edit.case.identity.cls),
            "identity": self.identity(edit.case, images),
            "layout": frame.mean(float((own & mask).sum() / (own | mask).sum()) for mask in others),
            "distance": self.distance(source, images),
            "text": self.text(edit.prompt, images),
        }

    def distance(self, source: Any, images: Any) -> float:
        """Mean distance of whole images to the source, over all feature maps alike."""
        one, others = (
            self.measure(normalise(each), output_hidden_states=True).hidden_states for each in (source, images)
        )
        heads = [level.new_full((level.shape[1],), 1 / len(one)) for level in one]
        return float(lpips(others, one, heads).mean())

    def edited_render(self, edit: Edit) -> Any:
        """A real render of what the edit asks for: the same subject, pose and place with the other pattern."""
        other = replace(edit.case.identity, texture=edit.texture, pattern_color="white", angle="vertical")
        drawn = subjects.rendered(world.make_identity(**vars(other)), edit.case.source_place, edit.seed)
        return drawn.movedim(-1, 1)

    def row(self, edit: Edit, swept: bool) -> dict[str, dict[str, float]]:
        """Base alone, tuned alone (in a plain sampler), the tuned model in the guidance's place from the edit prompt
        (v = 0 throughout), two references, and guided, if wanted over K and v. v = 1 and K = 1000 are the base alone.
        """
        base, tuned, how = self.world.model, self.tune(edit), self.settings

        def scores(model: Any, prompt: str = edit.prompt) -> dict[str, float]:
            return self.scored(edit, self.images(model, edit, prompt))

        row = {
            "base": scores(base),
            "tuned alone": scores(tuned),
            "tuned, v = 0": scores(self.guided(edit, tuned, 0.0, 0, edit.prompt)),
            "tuned, own prompt": scores(tuned, edit.training_prompt),
            "real edited render": self.scored(edit, self.edited_render(edit)),
        }
        points = [*((how.v, k) for k in KS), *((v, how.K) for v in VS if v != how.v)] if swept else [(how.v, how.K)]
        for v, k in points:
            alone = v == 1.0 or k == 1000
            row[setting(v, k)] = row["base"] if alone else scores(self.guided(edit, tuned, v, k))
        return row


def setting(v: float, k: int) -> str:
    """The name of a guided result in a row."""
    return f"v {v:g}, K {k}"


def effect(rows: frame.Rows, how: Settings) -> dict[str, Any]:
    """Means, paired intervals of guided over base, and what the gates ask."""
    guided = setting(how.v, how.K)
    mean = {"guided" if kind == guided else kind: scores for kind, scores in frame.means(rows).items()
            if kind == guided or "K" not in kind}  # fmt: skip
    gain = {score: frame.gain(rows, guided, "base", score) for score in SCORES}
    gates = {
        "reaches the target": mean["guided"]["reached"] >= mean["base"]["reached"] - LOST_GATE,
        "keeps identity better": gain["identity"]["low"] > 0,
        "keeps layout better": gain["layout"]["low"] > 0,
        "nearer to the source": gain["distance"]["high"] < 0,
        "tuned alone reaches it half as often": mean["tuned alone"]["reached"]
        <= ALONE_GATE * mean["guided"]["reached"],
    }
    return frame.gated({"subjects": len(rows), "mean": mean, "guided minus base": gain}, gates)


def sweep(rows: frame.Rows, how: Settings) -> dict[str, Any]:
    """Mean curves over K and v, and their rank correlations."""
    mean = frame.means(rows)
    over_k = [{"K": k, **mean[setting(how.v, k)]} for k in KS]
    over_v = [{"v": v, **mean[setting(v, how.K)]} for v in VS]
    rises = {
        "distance over K": frame.spearman(KS, [point["distance"] for point in over_k]),
        "text over K": frame.spearman(KS, [point["text"] for point in over_k]),
        "text over v": frame.spearman(VS, [point["text"] for point in over_v]),
    }
    return {
        "subjects": len(rows),
        "over K": over_k,
        "over v": over_v,
        "spearman": rises,
        "v nearest to the source": min(over_v, key=lambda point: point["distance"])["v"],
        "gates held": all(value >= SPEARMAN_GATE for value in rises.values()),
    }


def main(arguments: list[str]) -> int:
    """Print and write the figures; exit 1 when a gate is missed."""
    options = {"--sweep": {"type": Path, "help": "vary K and v too, write the curves as JSON"}}
    run = frame.Run("effect_sine", arguments, WORLDS, options, subjects=16)
    swept = run.options.sweep is not None
    rows = run.rows(
        run.chosen(edits), lambda: Bench(run.settings, run.world), lambda bench, edit: bench.row(edit, swept)
    )
    held = True
    if swept:
        curves = sweep(rows, run.settings)
        held = curves["gates held"]
        frame.say(json.dumps(curves, indent=1))
        frame.write(run.options.sweep, {"settings": {**asdict(run.settings), "seeds": run.seeds}, **curves})
    result = effect(rows, run.settings)
    return run.judged(rows, result, held=held and result["gates held"])
