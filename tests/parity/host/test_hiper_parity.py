"""HiPer through ComfyUI's UNet and our gradient session against the numbers of the authors' train.py."""

from __future__ import annotations

import pytest
import torch

from likeness.core.embedding.hiper import HiPer, HiPerSettings
from likeness.core.prompt.conditioning import apply_embedding, with_tail
from likeness.core.session.session import Session

from ..unets import SD_SCALE, arrays, tiny_sd15

UPDATES = 8


class Recorded(HiPer):
    """HiPer with the timesteps and the noise that the official run drew."""

    def draw(self):
        official = arrays("hiper.npz")
        return 0, official["t"][self.step], official["noise"][self.step]


@pytest.fixture(scope="module")
def official() -> dict[str, torch.Tensor]:
    return arrays("hiper.npz")


def in_session(official, work) -> None:
    """Run work(fit, x0) under inference mode, as a node is run."""
    with torch.inference_mode():
        positive = [[official["src"].clone(), {}]]

        def body(denoiser, x0):
            start = official["src"][0, -5:]
            work(Recorded(denoiser, x0, official["src"], start, HiPerSettings()), x0)

        Session(tiny_sd15(), positive, official["x0"] / SD_SCALE).run(body)


def test_latent_reaches_the_method_in_the_models_scale(official):
    in_session(official, lambda _fit, x0: torch.testing.assert_close(x0, official["x0"], atol=1e-6, rtol=0))


def test_losses_and_gradients_at_the_official_embeddings(official):
    def work(fit, _x0):
        for i in range(UPDATES):
            if i:
                with torch.no_grad():
                    fit.h.copy_(official["hiper"][i - 1][0])
            loss, _ = fit.loss(0, official["t"][i], official["noise"][i])
            (gradient,) = torch.autograd.grad(loss, fit.h)
            assert abs(float(loss.detach()) - float(official["loss"][i])) < 1e-5
            expected = official["grad"][i][0]
            assert float((gradient - expected).abs().max()) < 1e-4 * float(expected.abs().max())

    in_session(official, work)


def test_embeddings_after_every_update(official):
    def work(fit, _x0):
        for i in range(UPDATES):
            fit.update()
            difference = fit.h.detach() - official["hiper"][i][0]
            assert float(difference.square().mean().sqrt()) < 1e-4 and float(difference.abs().max()) < 2e-3
            assert abs(fit.losses[-1] - float(official["loss"][i])) < 1e-5

    in_session(official, work)


def test_conditionings_of_the_previews_and_of_inference(official):
    first = official["hiper"][0]
    ((source, _),) = apply_embedding([[official["src"], {}]], first, 1.0)
    ((target, _),) = apply_embedding([[official["tgt"], {}]], first, 0.8)
    assert torch.equal(source, official["preview_src_hiper"]) and torch.equal(target, official["preview_tgt_hiper08"])
    ((infer, _),) = apply_embedding([[official["tgt"], {}]], official["hiper"][-1], 0.8)
    torch.testing.assert_close(infer, official["infer_cond"], atol=1e-6, rtol=0)
    assert torch.equal(official["saved_step0"], first)
    assert torch.equal(with_tail(official["src"], first[0]), official["preview_src_hiper"])
