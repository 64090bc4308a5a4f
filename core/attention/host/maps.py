"""Cross-attention maps of a MODEL, a prompt's last tokens at several noise levels of one image, and a sheet of them: a
row for each token and one for their mean, a column for each noise level.
"""

from dataclasses import dataclass
from typing import Any

import comfy.utils
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...fit.fit import step_generator
from ...prompt.conditioning import Conditioning, single_prompt
from ...session.images import ImageSource, check_result
from ...session.session import GuiderDenoiser, predicting
from ...vision.host.sheets import MARGIN, labelled_grid, thumbnail
from ..maps import mean_over_layers, normalize_maps
from .joint import Call, looking

KEY = "likeness.inspect"
TILE, SHEET = 192, 4096  # px: maximum longer side of a map; approximate longer side of the whole sheet
TITLE = "attention to the last {} tokens of the prompt, from noise (0) to image (1)"
SHADES = ((24, 24, 27), (67, 30, 120), (190, 55, 90), (250, 150, 40), (255, 250, 190))  # from dark to light


@dataclass(frozen=True)
class Maps:
    """values [levels, tokens, h, w]: attention to each token, at latent resolution. percents: position in the
    sampling, 0 is pure noise. cell: pixels of the image in one of the latent."""

    values: Tensor
    percents: list[float]
    cell: int = 8

    def mask(self) -> Tensor:
        """The mean over levels and tokens, in 0..1, at image size: [1, H, W]."""
        mean = self.values.mean((0, 1))[None, None]
        return normalize_maps(torch.nn.functional.interpolate(mean, scale_factor=self.cell, mode="bilinear")[0])


def attention_maps(
    model: Any, conditioning: Conditioning, latent: dict[str, Tensor], tokens: int, levels: int, seed: int
) -> Maps:
    """The maps of the prompt's last `tokens` tokens at `levels` noise levels, evenly spaced over the sampling."""
    percents = [(index + 0.5) / levels for index in range(levels)]
    prompts = [prompt_at(conditioning, percent) for percent in percents]
    fewest = min(prompt[0].shape[1] for prompt in prompts)
    if tokens > fewest:
        raise ValueError(f"{tokens} rows were asked for, the prompt has {fewest}: ask for as many as were trained.")
    samples = ImageSource(latent).encoded(model).latent[:1]
    sampling = model.get_model_object("model_sampling")
    clone = model.clone()
    bar = comfy.utils.ProgressBar(levels)
    of_layers: list[Tensor] = []

    def record(call: Call, out: Tensor) -> Tensor:
        of_layers.append(call.maps(slice(None), slice(-tokens, None)).cpu())
        return out

    def recorded(executor, guider, sigmas, extra_args, callback, x, *more, **named) -> Any:
        extra_args = looking(extra_args, record, guider, guider.conds["positive"][0], x, sigmas[0])
        return executor(guider, sigmas, extra_args, callback, x, *more, **named)

    clone.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, recorded)

    def body(denoiser: GuiderDenoiser, x0: Tensor) -> Tensor:
        maps: list[Tensor] = []
        noise = torch.randn(x0.shape, generator=step_generator(seed, 0, "inspect")).to(x0)
        for percent, (rows, _) in zip(percents, prompts, strict=True):
            sigma = torch.tensor([float(sampling.percent_to_sigma(percent))]).to(x0)
            of_layers.clear()  # of the checks before the first prediction, or of the last one
            denoiser.denoised(denoiser.noised(x0, noise, sigma), sigma, rows.to(x0))
            maps.append(mean_over_layers(of_layers, (samples.shape[-2], samples.shape[-1])))
            bar.update(1)
        return torch.cat(maps)

    values = predicting(clone, [prompts[0]], samples, body)
    check_result("maps", values)
    cell = getattr(model.get_model_object("latent_format"), "spacial_downscale_ratio", 8)  # newer ComfyUI knows it
    return Maps(values, percents, cell)


def prompt_at(conditioning: Conditioning, percent: float) -> list[Any]:
    """The prompt active at a percent of the sampling, without its window. ValueError unless exactly one is active."""
    entries = [
        [rows, {name: value for name, value in options.items() if name not in ("start_percent", "end_percent")}]
        for rows, options in conditioning
        if options.get("start_percent", 0.0) <= percent < options.get("end_percent", 1.0)
    ]
    if len(entries) != 1:
        raise ValueError(
            f"{len(entries)} prompts hold at {percent:g} of the sampling, expected one: connect Apply Subject "
            "Embedding directly, without combining or time ranges."
        )
    single_prompt(entries, "prompt")
    return entries[0]


def map_sheet(maps: Maps) -> Tensor:
    """[1, H, W, 3] in 0..1. Each row is scaled to 0..1 separately; its maximum is printed next to it."""
    count = maps.values.shape[1]
    rows = [*maps.values.unbind(1), maps.values.mean(1)]
    names = [*(f"token {index - count}" for index in range(count)), "mean"]
    labels = [(name, f"to {float(row.amax()):.3f}") for name, row in zip(names, rows, strict=True)]
    # Rows x columns of maps fit on a sheet; each is at most TILE.
    height, width = maps.values.shape[-2:]
    places = (len(rows), height), (len(maps.percents), width)
    side = max(1, int(min(TILE, *((SHEET / n - MARGIN) * max(height, width) / length for n, length in places))))
    tiles = [[thumbnail(apply_colormap(tile), side) for tile in normalize_maps(row)] for row in rows]
    return labelled_grid(tiles, labels, [f"{percent:.2f}" for percent in maps.percents], TITLE.format(count))


def apply_colormap(values: Tensor) -> Tensor:
    """[h, w] in 0..1 -> [h, w, 3], from dark to light."""
    shades = torch.tensor(SHADES, dtype=torch.float32) / 255.0
    position = values.float().clamp(0.0, 1.0) * (len(SHADES) - 1)
    lower = position.floor().clamp(max=len(SHADES) - 2).long()
    fraction = (position - lower).unsqueeze(-1)
    return shades[lower] * (1 - fraction) + shades[lower + 1] * fraction
