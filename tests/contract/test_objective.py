"""A loss on what the network gives out is the model's own objective, whatever it predicts; asked of its sampling."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from likeness.core.denoiser import output_error
from likeness.core.session.sampling import objective
from likeness.core.session.session import GuiderDenoiser

from .methods import METHODS, run_node
from .setting import SharedSetting as Setting

METHOD = {method.name: method for method in METHODS}
NOISE, NEW = {}, {"objective": "network output"}
X0, NOISES, OUTPUT = (torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(seed)) for seed in range(3))


def v_target(x0, eps, sigma, data=1.0):
    """Salimans and Ho's alpha eps - sigma x0, in ComfyUI's coordinates; data: the deviation of x0."""
    return (data**2 * eps - sigma * x0) / (data * (sigma**2 + data**2).sqrt())


TARGETS = {  # prediction, settings of the sampling, what the network should give for x0 and eps, what headers say
    "eps": ("EPS", {}, lambda x0, eps, sigma: eps, NOISE),
    "v": ("V_PREDICTION", {}, v_target, NEW),
    "zero-SNR v": ("V_PREDICTION", {"zsnr": True}, v_target, NEW),
    "v of EDM": ("V_PREDICTION_EDM", {"sigma_data": 0.5}, lambda *given: v_target(*given, 0.5), NEW),
    "EDM": ("EDM", {"sigma_data": 0.5}, lambda *given: -v_target(*given, 0.5), NEW),
    "flow": ("FLOW", {"shift": 3.0}, lambda x0, eps, sigma: eps - x0, NOISE),
    "flux": ("FLUX", {}, lambda x0, eps, sigma: eps - x0, NOISE),
    "Cosmos": ("FLOW_COSMOS", {}, lambda x0, eps, sigma: eps - x0, NEW),
}


def sampling_of(prediction: str, settings: dict):
    import comfy.model_base

    kind = comfy.model_base.ModelType[prediction]
    return comfy.model_base.model_sampling(SimpleNamespace(sampling_settings=settings), kind)


def denoiser_of(sampling) -> GuiderDenoiser:
    """Of a network that always gives the same."""

    class Guider:
        conds, inner_model = {"positive": [{"model_conds": {}}]}, SimpleNamespace(model_sampling=sampling)

        def __call__(self, x, sigma, **_more):
            return sampling.calculate_denoised(sigma, OUTPUT, x)

    return GuiderDenoiser(Guider(), {}, OUTPUT)


@pytest.mark.parametrize("case", TARGETS)
def test_the_loss_is_the_error_of_the_networks_own_output(case):
    prediction, settings, target, said = TARGETS[case]
    sampling = sampling_of(prediction, settings)
    denoiser, table = denoiser_of(sampling), sampling.sigmas
    for index in (0, 100, 500, 700, 999):
        sigma = table[index].expand(2)
        error, _ = output_error(denoiser, X0, NOISES, sigma, None)
        expected = (OUTPUT - target(X0, NOISES, table[index])).square().mean()
        torch.testing.assert_close(error.square().mean(), expected, rtol=1e-3 if index == 0 else 1e-5, atol=1e-5)
    assert objective(sampling) == said


@pytest.mark.parametrize("case", ["eps", "flow", "flux"])
def test_models_of_noise_and_flow_learn_as_before_to_the_bit(case):
    sampling = sampling_of(*TARGETS[case][:2])
    denoiser = denoiser_of(sampling)
    for index in (1, 500, 999):
        sigma = sampling.sigmas[index].expand(2)
        error, denoised = output_error(denoiser, X0, NOISES, sigma, None)
        assert torch.equal(error, (X0 - denoised) / sigma.view(-1, 1, 1, 1))


@pytest.mark.parametrize(("sampling", "said"), [("lcm", NOISE), ("x0", NEW), ("v_prediction", NEW), ("eps", NOISE)])
def test_a_node_that_changes_the_sampling_is_asked_too(sampling, said):
    """LCM's output is noise, which its sampling mixes with the input at the cleanest level."""
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

    model = run_node(ModelSamplingDiscrete, model=Setting().model, sampling=sampling, zsnr=False)[0]
    assert objective(model.get_model_object("model_sampling")) == said


@pytest.mark.usefixtures("own_folders")
@pytest.mark.parametrize("name", ["hiper", "step-wise", "sine"])
def test_headers_and_keys_say_which(name, monkeypatch):
    from likeness.core.session.job import Job

    method = METHOD[name]
    assert "objective" not in str(method.fit(Setting(), steps=1)[0].header)
    setting = Setting("sd2_v")
    assert f"'objective': '{NEW['objective']}'" in str(method.fit(setting, steps=1)[0].header)
    monkeypatch.setattr(Job, "objective", {})
    monkeypatch.setattr("likeness.core.session.session.Session.run", lambda *_: pytest.fail("it is trained again"))
    with pytest.raises(pytest.fail.Exception, match="trained again"):  # the earlier objective's run has another key
        method.fit(setting, steps=1)
