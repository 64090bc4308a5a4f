"""A session's weights are normal tensors in the memory of the loaded ones: no second copy of the model. What a session
leaves behind on a model that other nodes share does not change the key of a run.
"""

from __future__ import annotations

import pytest
import torch

from .. import tiny_models


class Packed(torch.Tensor):
    """Weights whose numbers only their class knows."""


def numbers(module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


def test_thawed_weights_are_normal_and_take_no_memory():
    from likeness.core.session.weights import thawed

    network = tiny_models.sd1().model.diffusion_model
    with torch.inference_mode():
        network.to(memory_format=torch.channels_last)
    before = numbers(network)
    assert all(value.is_inference() for value in before)
    with torch.inference_mode(False), torch.enable_grad(), thawed([network]):
        during = numbers(network)
        assert not any(value.is_inference() or value.requires_grad for value in during)
        places = [[(each.data_ptr(), each.shape, each.stride()) for each in part] for part in (before, during)]
        assert places[0] == places[1]
    assert all(one is other for one, other in zip(before, numbers(network), strict=True))


def test_trained_weights_are_compared_with_the_loaded_ones_themselves():
    """A training of all weights copies them once, to train the copy: what they were is read where it lies."""
    from likeness.core.lora.artifact import weight_differences
    from likeness.core.session.weights import thawed

    network = tiny_models.sd1(dtype=torch.bfloat16).model.diffusion_model
    loaded = {f"network.{name}": value for name, value in network.named_parameters()}
    with torch.inference_mode(False), torch.enable_grad(), thawed([network], {"network": network}) as (leaves, before):
        assert leaves.keys() == before.keys() == loaded.keys()
        assert all(value.data_ptr() == loaded[name].data_ptr() for name, value in before.items())
        assert not weight_differences(before, leaves)
        with torch.no_grad():
            for leaf in leaves.values():
                leaf += 0.25
        found = weight_differences(before, leaves)
    assert len(found) == len(loaded) and all((value == 0.25).all() for value in found.values())


def test_packed_weights_are_copied():
    from likeness.core.session.weights import thawed

    layer = torch.nn.Linear(3, 2, bias=False)
    with torch.inference_mode():
        packed = torch.arange(6.0).view(2, 3).as_subclass(Packed)
    layer._parameters["weight"] = packed
    with torch.inference_mode(False), thawed([layer]):
        assert isinstance(layer.weight.data, Packed) and layer.weight.data_ptr() != packed.data_ptr()
        assert not layer.weight.is_inference() and torch.equal(layer.weight, packed.clone())
    assert layer.weight is packed


@pytest.mark.parametrize("compute, copies", [(None, 0), (torch.bfloat16, 1)])
def test_only_casts_are_counted_as_a_second_copy(compute, copies):
    from likeness.core.session import session

    model, latent = tiny_models.sd1(), torch.zeros(1, 4, 8, 8)
    if compute is not None:
        model.set_model_compute_dtype(compute)
    activations = session.activations(model, latent, False)
    assert session._memory([model], latent, False, False) == activations + copies * model.model_size() > 0


def test_precision_is_the_models_own_while_a_trainings_clone_is_loaded():
    import comfy.model_management as mm

    from likeness.core.session.fingerprint import precision

    model = tiny_models.sd1(dtype=torch.bfloat16)
    clone, before = model.clone(), precision(model)
    clone.set_model_compute_dtype(torch.bfloat16)
    with torch.inference_mode():
        mm.load_models_gpu([clone])
    assert model.model.manual_cast_dtype == torch.bfloat16  # of the module that both share
    assert precision(model) == before == ["torch.bfloat16", "None"]
    assert precision(clone) == ["torch.bfloat16", "torch.bfloat16"]


def test_all_weights_of_a_bf16_model_are_served_when_queued_again(tmp_path, monkeypatch):
    import folder_paths

    from likeness.core.session import job
    from likeness.nodes.fine_tune import LikenessFineTune

    from .setting import Setting, autoencoder, run_node

    folder_paths.set_user_directory(str(tmp_path / "user"))
    setting, train, trained = Setting(), job.train, []
    model = tiny_models.sd1(dtype=torch.bfloat16)
    monkeypatch.setattr(job, "train", lambda *a, **more: trained.append(a[1]) or train(*a, **more))
    defaults = {each.id: getattr(each, "default", None) for each in LikenessFineTune.define_schema().inputs}
    inputs = {name: value for name, value in defaults.items() if value is not None}
    inputs |= {"model": model, "vae": autoencoder(), "image": setting.image, "positive": setting.source, "steps": 2}
    inputs |= {"method": "full weights", "patches": False, "resolution": 64, "learning_rate": 1e-3}
    losses = [run_node(LikenessFineTune, **inputs)[3] for _ in range(2)]
    assert trained == [2] and losses[0] == losses[1]


def test_what_a_prediction_holds_is_let_go_at_its_end():
    """Not only when the garbage is collected, which may be in the middle of the next sampling."""
    import gc
    import weakref

    from likeness.core.session.session import predicting

    class Held:
        pass

    held = Held()
    alive, model = weakref.ref(held), tiny_models.sd1()
    prompt, latent = [[torch.randn(1, 77, 768), {}]], torch.zeros(1, 4, 8, 8)
    gc.collect()
    gc.disable()
    try:
        with torch.inference_mode():
            predicting(model, prompt, latent, lambda _denoiser, _x0, held=held: 1)
        del held
        assert alive() is None
    finally:
        gc.enable()


def test_the_layers_of_a_compiled_network_are_found():
    from likeness.core.attention.host.layers import transformer_layers

    network = tiny_models.sd1().model.diffusion_model
    found = transformer_layers(network)
    assert found and transformer_layers(torch.compile(network, backend="eager")) == found
