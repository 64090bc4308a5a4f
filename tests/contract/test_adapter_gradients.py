"""The gradient of EZIGen's adapter through ComfyUI's UNet."""

from __future__ import annotations

import pytest
import torch

from .. import tiny_models

STEP = 1e-4  # of finite differences


def test_gradients_of_every_tensor(monkeypatch):
    """All 113 tensors of an adapter for SD2.1's layout, against finite differences through ComfyUI's UNet.

    Along the gradient, for all tensors of one kind and for all of one block: an error in one of them shows in both.
    """
    from likeness.core.ezigen.host.layers import UNet, new_adapter
    from likeness.core.ezigen.train import Draw, Sample, errors
    from likeness.core.fit.fit import step_generator

    model = tiny_models.sd2_base()
    unet = model.model.diffusion_model
    with torch.inference_mode(False):
        state = {name: value.clone().double() for name, value in unet.state_dict().items()}
        unet.double().load_state_dict(state, assign=True)
        unet.requires_grad_(False)
    network = UNet(model.model, new_adapter(model.model).double())
    network.dtype = torch.float64
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # the loss too, which is float32 otherwise
    generator = torch.Generator().manual_seed(3)

    def drawn(pictures: int) -> Sample:
        shapes = ((4, 8, 8), (77, 16), (pictures, 4, 8, 8), (pictures, 77, 16))
        return Sample(*(torch.randn(shape, generator=generator).double() for shape in shapes))

    samples, features, capture = [drawn(1), drawn(2)], [], network.capture

    def once(*given):
        """The subjects' features are the UNet's, which no tensor of the adapter changes."""
        features[:] = features or [capture(*given)]
        return features[0]

    monkeypatch.setattr(network, "capture", once)

    def loss() -> torch.Tensor:
        draws = [Draw(timestep, False, step_generator(1, timestep)) for timestep in (300, 700)]
        return errors(network, samples, draws).mean()

    named = network.adapter.published_parameters()
    assert len(named) == 113
    with torch.no_grad():
        for value in named.values():
            value += 0.02 * torch.randn(value.shape, generator=generator).double()
    loss().backward()
    groups: dict[str, list[str]] = {}
    for name in named:
        block, _, kind = name.partition(".transformer_blocks.0.")
        for group in (block, kind) if kind else (name,):
            groups.setdefault(group, []).append(name)
    assert len(groups) == 16 + 7 + 1
    for group, names in groups.items():
        found = {name: named[name].grad for name in names}
        assert all(grad is not None and bool(grad.any()) for grad in found.values())
        norm = float(sum(grad.square().sum() for grad in found.values()).sqrt())
        values = []
        with torch.no_grad():
            for move in (STEP, -2 * STEP, STEP):  # there, to the other side, and back
                for name, grad in found.items():
                    named[name] += move * grad / norm
                if len(values) < 2:
                    values.append(float(loss()))
        assert (values[0] - values[1]) / (2 * STEP) == pytest.approx(norm, rel=1e-3), group
