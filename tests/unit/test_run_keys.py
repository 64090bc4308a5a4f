"""Names that stand in the keys of stored runs. A rename here trains every stored run again, so it must be meant.

The keys hold the names of settings, methods, and of the pack's own classes and functions on a model. To add a setting,
let the key hold it only where it differs from what runs before it had.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

CORE = Path(__file__).parents[2] / "core"

FIELDS = {  # by asdict(), in this order
    "embedding/hiper.py HiPerSettings": "tokens learning_rate seed t_low t_high",
    "embedding/hifi_tuner.py Regularizer": "rows weight decoupled",
    "embedding/hifi_tuner.py StepWiseSettings": "inner_steps learning_rate seed",
    "session/images.py TrainingImages": "latent mask",
    "inversion/null_text.py NullTextSettings": "cfg inner_steps learning_rate epsilon patience",
    "inversion/renoise.py Replay": "sigmas noises",
    "reference/guidance.py ReferenceSettings": "cfg inner_steps learning_rate",
    "sine/fine_tune.py FineTuneSettings": "learning_rate seed recon_weight prior_weight",
    "sine/host/crops.py CropSettings": "resolution cells crops whole_image",
    "siso/siso.py SisoSettings": "learning_rate weight_decay text_rate text_decay threshold patience optimizer",
    "siso/host/optimize_lora.py Sampling": "latent sigmas seed cfg grad_steps replay",
    "vision/preprocess.py Preprocess": "size shorter_side mean std mode published",
    "ezigen/train.py TrainingSettings": "seed batch learning_rate drop",
}
DESCRIBED = {  # what is described by its class and the names of what it holds
    "sine/host/position_map.py PositionMap": "cells interpolation window",
    "sine/host/position_map.py RotaryMap": "map",
    "inversion/host/landing.py Landing": "targets levels mask rows residuals",
    "ezigen/host/layers.py Place": "key module layer",
    "ezigen/adapter.py Layer": "name width heads",
    "ezigen/adapter.py SubjectTokens": "layers present",
}
TRAININGS = {  # the job, and the name of its method
    "embedding/host/train.py EmbeddingJob": "hiper",
    "embedding/host/refine.py RefiningJob": "hifi tuner, step-wise",
    "inversion/host/null_text.py NullTextJob": "null-text",
    "reference/host/guidance.py ReferenceJob": "reference guide",
    "sine/host/fine_tune.py FineTuneJob": "sine",
    "siso/host/optimize_lora.py SisoJob": "siso",
    "ezigen/host/train.py AdapterJob": "ezigen",
}
WORDS = {  # texts in a key, by the file that has them
    "sine/host/fine_tune.py": ("LoRA", "full weights"),
    "session/sampling.py": ("objective", "network output"),
    "siso/host/optimize_lora.py": ("threshold", "patience", "picture", "mask", "weight"),
    "session/fingerprint.py": ("family", "prediction", "latent_format", "shapes", "content"),
}


def tree(name: str) -> ast.Module:
    return ast.parse((CORE / name).read_text(encoding="utf-8"))


def classes(name: str) -> dict[str, ast.ClassDef]:
    return {node.name: node for node in tree(name).body if isinstance(node, ast.ClassDef)}


def fields(entry: str) -> str:
    """The fields of a dataclass, in order, without ClassVars."""
    name, kind = entry.split()
    found = [node for node in classes(name)[kind].body if isinstance(node, ast.AnnAssign)]
    return " ".join(ast.unparse(node.target) for node in found if "ClassVar" not in ast.unparse(node.annotation))


@pytest.mark.parametrize("entry", [*FIELDS, *DESCRIBED])
def test_a_setting_keeps_its_name_and_place(entry):
    assert fields(entry) == {**FIELDS, **DESCRIBED}[entry]


@pytest.mark.parametrize("entry", TRAININGS)
def test_a_method_keeps_its_name(entry):
    name, kind = entry.split()
    values: dict[str, object] = {}
    for node in tree(name).body:
        if isinstance(node, ast.Assign):
            target, value = node.targets[0], node.value
            pairs = zip(target.elts, value.elts) if isinstance(target, ast.Tuple) else [(target, value)]  # noqa: B905
            values |= {
                ast.unparse(one): ast.literal_eval(each) for one, each in pairs if isinstance(each, ast.Constant)
            }
    bodies = [node for node in classes(name)[kind].body if isinstance(node, ast.AnnAssign)]
    (method,) = (ast.unparse(node.value) for node in bodies if node.value and ast.unparse(node.target) == "method")
    assert (values[method] if method in values else ast.literal_eval(method)) == TRAININGS[entry]


def test_every_training_is_in_the_table():
    found = set()
    for path in CORE.rglob("*.py"):
        name = path.relative_to(CORE).as_posix()
        jobs = {kind: ast.unparse(node) for kind, node in classes(name).items() if kind.endswith("Job")}
        found |= {f"{name} {kind}" for kind, text in jobs.items() if "method: ClassVar[str] =" in text}
    assert found == TRAININGS.keys()


@pytest.mark.parametrize("name", WORDS)
def test_a_text_in_a_key_stays(name):
    constants = {node.value for node in ast.walk(tree(name)) if isinstance(node, ast.Constant)}
    assert set(WORDS[name]) <= constants
