"""What hangs on a model is told apart by its numbers, and equal things stay equal."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from likeness.core.fit.runs import digest
from likeness.core.session.describe import describe
from likeness.core.session.fingerprint import patches_digest, precision

from .. import tiny_models
from .methods import Setting, run_node, sample


def closing_over(value):
    return lambda x: x * value


def scaled(x, s=1, *, k=0):
    return x * s + k


def key(value) -> str:
    return digest(describe(value))


PAIRS = {
    "closures": (closing_over(1.0), closing_over(2.0)),
    "partials": (functools.partial(scaled, s=1), functools.partial(scaled, s=2)),
    "arrays": (np.arange(3), np.arange(3) + 1),
    "dtypes": (torch.float16, torch.float32),
    "code": (lambda x: x + 1, lambda x: x + 2),
    "modules": (torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)),
    "tensors": ({"a": torch.zeros(2)}, {"a": torch.ones(2)}),
}


def test_different_things_have_different_keys():
    assert [name for name, (first, second) in PAIRS.items() if key(first) == key(second)] == []


def test_equal_things_have_equal_keys():
    for name, (first, _) in PAIRS.items():
        assert key(first) == key(first), name
    assert key(closing_over(3.0)) == key(closing_over(3.0))
    assert key(functools.partial(scaled, s=3)) == key(functools.partial(scaled, s=3))


def test_a_prediction_type_is_told_apart_by_the_bases_of_its_sampling():
    """ComfyUI's node makes a class of one name for all of them, with the same levels."""
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

    model = Setting().model
    found = {}
    for sampling in ("eps", "v_prediction", "x0"):
        keys = {patches_digest(ModelSamplingDiscrete().patch(model, sampling, False)[0]) for _ in range(2)}
        (found[sampling],) = keys
    assert len(set(found.values())) == 3


def test_a_model_is_the_same_before_and_after_it_was_loaded():
    setting = Setting()
    before = key(setting.model)
    sample(setting.model, setting.target, setting.empty, setting.latent, steps=2)
    assert key(setting.model) == before


class Packed(torch.Tensor):
    """Bytes that stand for a weight of another shape, as those of GGUF layers do."""

    def detach(self):
        return self

    @property
    def shape(self):
        return torch.Size((1, 1))


def quantised(model_seed: int, hides: bool):
    """A model whose layers are packed into bytes, which their state shows, or empty tensors of it and one too many."""
    model = Setting(model_seed=model_seed).model

    def saved(layer, destination, prefix, keep_vars):
        weight = layer.weight.data.as_subclass(torch.Tensor)
        destination[f"{prefix}weight"] = weight.to("meta") if hides else weight
        destination[f"{prefix}scale_weight"] = torch.ones(())
        if hides:
            destination[f"{prefix}temp.weight"] = torch.zeros(4, 4, device="meta")
        if layer.bias is not None:
            destination[f"{prefix}bias"] = layer.bias

    for layer in model.model.diffusion_model.modules():
        if isinstance(layer, torch.nn.Linear):
            packed = layer.weight.data[:, ::2].mul(100).to(torch.uint8).as_subclass(Packed)
            layer.weight = torch.nn.Parameter(packed, requires_grad=False)
            layer._save_to_state_dict = functools.partial(saved, layer)
    return model


@pytest.mark.parametrize("hides", [True, False])
def test_quantised_models_are_models_too(caplog, hides):
    from likeness.core.session.fingerprint import check_base, fingerprint

    whole, model = Setting().model, quantised(0, hides)
    recorded = fingerprint(whole)
    check_base(recorded, model)
    check_base(fingerprint(model), whole)
    check_base(fingerprint(model), quantised(0, hides))
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    with pytest.raises(ValueError, match="prediction differ"):
        check_base({**recorded, "prediction": "V_PREDICTION"}, model)
    check_base(fingerprint(model), quantised(1, hides))
    assert "other weights" in caplog.text


@pytest.mark.parametrize("hides", [True, False])
def test_quantised_models_are_told_apart(hides):
    """By the name of a run above all: else one would be served what the other has learned."""
    from likeness.core.session.fingerprint import fingerprint

    for of in (fingerprint, key):
        one, again, other = (of(quantised(seed, hides)) for seed in (0, 0, 1))
        assert one == again != other


def test_a_lora_that_is_written_into_the_weights_is_described_once(clip):
    """Before the model is loaded and after, and a text encoder's too."""
    import comfy.model_management as mm

    for patcher in (Setting().model, clip.patcher.clone()):
        names = [name for name in patcher.model.state_dict() if name.endswith(("to_q.weight", "q_proj.weight"))]
        bare = key(patcher)
        shapes = {name: patcher.model.get_parameter(name).shape for name in names}
        patcher.add_patches({name: ("diff", (torch.ones(shape),)) for name, shape in shapes.items()})
        before = key(patcher)
        mm.load_models_gpu([patcher], force_full_load=True)
        assert names and len(patcher.backup) >= len(names)
        assert bare != before == key(patcher)
        mm.unload_all_models()


def test_what_a_lora_was_written_over_counts_as_its_state_shows_it():
    """The newest core keeps a quantised weight whole beside a state of its bytes."""
    from types import SimpleNamespace

    from likeness.core.session.describe import contents_of_file

    class Whole:
        def state_dict(self, name):
            return {name: torch.ones(2, dtype=torch.int8), f"{name}_scale": torch.ones(())}

    model = torch.nn.Linear(2, 2)
    backup = {"weight": SimpleNamespace(weight=Whole()), "bias": SimpleNamespace(weight=torch.zeros(2))}
    found = contents_of_file(SimpleNamespace(model=model, patches={}, backup=backup))
    assert found["weight"].dtype == torch.int8 and not found["bias"].any() and found.keys() == {"weight", "bias"}


def test_weights_that_are_nowhere_to_be_seen_are_like_no_others():
    layer = torch.nn.Linear(2, 2, device="meta")
    assert key(layer) != key(layer)


def test_a_model_that_shows_nothing_of_itself_is_like_no_other():
    from likeness.core.session.fingerprint import fingerprint

    model = Setting().model
    for layer in model.model.diffusion_model.modules():
        layer._save_to_state_dict = lambda *_args: None
    assert fingerprint(model) != fingerprint(model)


@pytest.mark.parametrize("setting", ["number", "list", "tensor", "dtype"])
def test_modules_of_patches_are_told_apart_by_their_settings(setting):
    class Leaf(torch.nn.Module):
        def __init__(self, value) -> None:
            super().__init__()
            self.value = value

    first, second = {
        "number": (1.0, 2.0), "list": ([1], [1, 2]), "tensor": (torch.zeros(2), torch.ones(2)),
        "dtype": (torch.float16, torch.float32),
    }[setting]  # fmt: skip
    for made in (Leaf, lambda value: torch.nn.Sequential(Leaf(value))):
        assert key(made(first)) == key(made(first)) != key(made(second))


def test_what_cannot_be_told_apart_is_never_equal():
    class Closed:
        __slots__ = ("value",)

    assert key(Closed()) != key(Closed())


def test_cycles_end():
    ring: dict = {"a": 1}
    ring["self"] = ring
    assert key(ring) == key(ring)


def injected(model, amount: float, wrapped: bool = False):
    """A clone of a MODEL with something that is no patch: an injection, as bypass LoRAs are, or a weight's wrapper."""
    from comfy.patcher_extension import PatcherInjection

    class Hook:
        def __init__(self) -> None:
            self.weights, self.original_forward = torch.full((2,), amount), None

    hook, clone = Hook(), model.clone()
    if wrapped:
        clone.add_weight_wrapper("diffusion_model.out.2.weight", lambda weight: weight * amount)
    else:
        clone.set_injections("x", [PatcherInjection(inject=lambda _model: hook, eject=lambda _model: None)])
    return clone, hook


@pytest.mark.parametrize("wrapped", [False, True])
def test_what_is_injected_counts(wrapped):
    model = Setting().model
    one, two, again = (injected(model, amount, wrapped)[0] for amount in (1.0, 2.0, 1.0))
    for of in (patches_digest, key):
        assert len({of(model), of(one), of(two)}) == 3 and of(one) == of(again)


def test_an_injection_in_use_has_the_same_key():
    model, hook = injected(Setting().model, 1.0)
    before = patches_digest(model)
    hook.original_forward = torch.nn.Linear(2, 2).forward
    assert patches_digest(model) == before


def test_an_injection_that_holds_layers_has_the_same_key_however_they_are_loaded():
    """As a bypass LoRA's does; ComfyUI's newest loader leaves its notes on the layers."""
    model, hook = injected(Setting().model, 1.0)
    hook.module = next(
        layer for layer in model.model.diffusion_model.modules()
        if isinstance(layer, torch.nn.Linear) and hasattr(layer, "comfy_cast_weights")
    )  # fmt: skip
    before = patches_digest(model)
    hook.module.seed_key, hook.module.weight_lowvram_function = "input_blocks.1", None
    assert patches_digest(model) == before


def test_our_own_guidance_has_no_part_in_a_training():
    from likeness.nodes.guidance import LikenessGuidance

    setting = Setting()
    inputs = {"base_weight": 0.7, "end_percent": 0.6, "start_percent": 0.0, "k_timestep": -1, "allow_over_one": False}
    tuned = Setting(model_seed=1).model
    guided = run_node(LikenessGuidance, model=setting.model, tuned=tuned, tuned_positive=setting.source, **inputs)[0]
    assert guided.wrappers != setting.model.wrappers and guided.additional_models
    assert patches_digest(guided) == patches_digest(setting.model)


def test_precisions_of_weights_and_computing_are_told_apart():
    model = Setting().model
    cast = model.clone()
    cast.set_model_compute_dtype(torch.float64)
    assert precision(model) == ["torch.float32", "None"] and precision(cast) == ["torch.float32", "torch.float64"]
    with torch.inference_mode():
        other = Setting().model
        other.model.diffusion_model.dtype = torch.float16
    assert precision(other)[0] == "torch.float16"


@pytest.mark.parametrize(
    ("now", "before"),
    [
        ("core.sine.host.position_map", "core.host.position_map"),
        ("core.vision.host.extras.tower", "core.host.extras.tower"),
        ("core.vision.preprocess", "core.preprocess"),
        ("core.denoiser", "core.denoiser"),
    ],
)
def test_a_run_is_found_again_when_a_file_has_moved_to_its_room(now, before):
    """Keys of 0.5.0 hold the modules of then."""
    moved = type("Moved", (), {"__module__": f"likeness.{now}"})
    assert describe(moved) == f"likeness.{before}.Moved"


OWN_NAMES = {  # without the room, so that moving a file changes no key; see tests/unit/test_run_keys.py
    "map": ("host.position_map.PositionMap", "host.position_map._tell_areas", "host.position_map._tell_size"),
    "adapter": (
        "adapter.Adapter",
        "adapter.Layer",
        "adapter.SubjectTokens",
        "host.adapter._Injection",
        "host.layers.Place",
    ),
    "landing": ("host.landing.Landing",),
    "vision": ("host.extras.tower.Tower", "host.extras.transformers_folder.TransformersTower"),
}


def with_own_part(what: str, setting: Setting, folder):
    """A model with a part of the pack on it that a training goes through."""
    from likeness.core.ezigen.host.adapter import with_adapter
    from likeness.core.inversion.host.landing import Landing, attach_landing
    from likeness.core.sine.host.position_map import with_position_map
    from likeness.core.vision.host.vision import load_vision

    from ..vision.models import clip_folder
    from .test_adapter import stored, subject

    if what == "vision":
        clip_folder(folder)
        return load_vision(folder).patcher
    if what == "map":
        return with_position_map(setting.model, 8, "bilinear")
    if what == "adapter":
        return with_adapter(setting.model, stored(setting.model), subject(setting))
    return attach_landing(setting.model, Landing({0: torch.zeros(1, 4, 8, 8)}, (1.0, 0.0)))


@pytest.mark.parametrize("what", OWN_NAMES)
def test_the_packs_own_names_in_a_key_stay(what, tmp_path, monkeypatch):
    from likeness.core.session import describe as module

    patched, names, own = with_own_part(what, Setting(), tmp_path), set(), module._name
    monkeypatch.setattr(module, "_name", lambda value: names.add(own(value)) or own(value))
    module.describe(patched) if what == "vision" else patches_digest(patched)
    assert {name for name in names if name.startswith("likeness.")} == {
        f"likeness.core.{name}" for name in OWN_NAMES[what]
    }


def test_the_precision_of_a_text_encoder_is_the_same_whether_it_is_loaded_or_not():
    """ComfyUI 0.33 says with an object patch in what it computes, which the module has only while it is loaded."""
    import comfy.model_management

    patcher = tiny_models.clip_l(seed=9).patcher
    found = [precision(patcher)]
    with torch.inference_mode():
        comfy.model_management.load_models_gpu([patcher])
        found.append(precision(patcher))
        patcher.detach()
    assert found == [found[0], found[0]] == [precision(patcher)] * 2
