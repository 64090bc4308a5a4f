"""Inversion and null-text optimisation through ComfyUI's UNet and our session, against the public code's numbers."""

from __future__ import annotations

import pytest
import torch

from likeness.core.inversion.ddim import invert
from likeness.core.inversion.null_text import NullText, NullTextSettings
from likeness.core.prompt.windows import step_wise, windows
from likeness.core.session.session import Session

from ..unets import SD_SCALE, arrays, tiny_sd15

ROUND = 1e-5  # inner counts may differ where a loss lies this close to the threshold


@pytest.fixture(scope="module")
def official() -> dict[str, torch.Tensor]:
    return arrays("nulltext.npz")


def levels(official) -> torch.Tensor:
    """Their levels as SIGMAS; the last is that of timestep 0, not 0."""
    alphas = official["alphas_cumprod"].double()
    table = ((1 - alphas) / alphas).sqrt()
    return torch.stack([*(table[t] for t in official["timesteps"]), table[0]]).float()


def scaled(official, vp: torch.Tensor) -> torch.Tensor:
    """Latents of variance 1, noisiest first, in ComfyUI's coordinates."""
    return vp * (1 + levels(official).view(-1, 1, 1, 1, 1) ** 2).sqrt()


def in_session(official, work) -> None:
    with torch.inference_mode():
        positive = [[official["cond"].clone(), {}]]
        Session(tiny_sd15(), positive, official["x0"] / SD_SCALE).run(lambda denoiser, _x0: work(denoiser))


def test_pivots(official):
    def work(denoiser):
        with torch.no_grad():
            sigmas = levels(official)
            x0 = official["x0"] * (1 + sigmas[-1] ** 2).sqrt()
            found = invert(denoiser, x0, official["cond"], sigmas)
        vp = found / (1 + sigmas.view(-1, 1, 1, 1, 1) ** 2).sqrt()
        torch.testing.assert_close(vp.flip(0), official["std_pivot"], atol=2e-5, rtol=0)

    in_session(official, work)


@pytest.mark.parametrize("run", ["std", "early"])
def test_null_text(official, run):
    def work(denoiser):
        pivots = scaled(official, official[f"{run}_pivot"].flip(0))
        settings = NullTextSettings(epsilon=float(official[f"{run}_eps"]))
        fit = NullText(denoiser, pivots, levels(official), official["cond"], official["uncond"], settings)
        while not fit.done:
            fit.update()
        assert fit.counts == official[f"{run}_inner_counts"].tolist()
        torch.testing.assert_close(torch.tensor(fit.losses), official[f"{run}_losses"].float(), atol=2e-3, rtol=2e-2)
        apart = (
            torch.stack(fit.nulls) - official[f"{run}_null"]
        ).abs()  # Adam amplifies rounding where gradients vanish
        assert float(apart.mean()) < 1e-3 and float(apart.max()) < 2e-2
        final = fit.x / (1 + levels(official)[-1] ** 2).sqrt()
        torch.testing.assert_close(final, official[f"{run}_replay"][-1], atol=1e-3, rtol=0)

    in_session(official, work)


@pytest.mark.parametrize("run", ["std", "early"])
def test_playback_in_the_stock_sampler(official, run):
    """Their embeddings as windowed negatives, through ComfyUI's guider and Euler sampler."""
    import comfy.samplers

    model = tiny_sd15()
    sampling = model.get_model_object("model_sampling")
    sigmas = levels(official)
    steps = windows(sigmas.tolist(), sampling.percent_to_sigma)
    seen = []
    with torch.inference_mode():
        negative = step_wise([[official["uncond"], {}]], official[f"{run}_null"].unbind(), steps)
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds([[official["cond"], {}]], negative)
        guider.set_cfg(float(official["guidance"]))
        start = scaled(official, official[f"{run}_pivot"].flip(0))[0] / SD_SCALE
        sampler = comfy.samplers.sampler_object("euler")
        final = guider.sample(
            torch.zeros_like(start), start, sampler, sigmas, callback=lambda *step: seen.append(step[2]), seed=0,
            disable_pbar=True,
        )  # fmt: skip
    replay = official[f"{run}_replay"]
    for step, x in enumerate(seen):
        torch.testing.assert_close(x / (1 + sigmas[step] ** 2).sqrt(), replay[step], atol=2e-5, rtol=0)
    torch.testing.assert_close(final * SD_SCALE / (1 + sigmas[-1] ** 2).sqrt(), replay[-1], atol=2e-5, rtol=0)
