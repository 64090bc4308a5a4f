"""Cross-attention maps of a MODEL: a prompt's last tokens at several noise levels of one image."""

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
from ..maps import mean_over_layers, normalize_maps
from .joint import Call, looking

KEY = "likeness.inspect"


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
    maps, of_layers = list[Tensor](), list[Tensor]()

    def record(call: Call, out: Tensor) -> Tensor:
        of_layers.append(call.maps(slice(None), slice(-tokens, None)).cpu())
        return out

    def recorded(executor: Any, guider: Any, sigmas: Tensor, extra_args: Any, callback: Any, x: Tensor, *more) -> Any:
        extra_args = looking(extra_args, record, guider, guider.conds["positive"][0], x, sigmas[0])
        return executor(guider, sigmas, extra_args, callback, x, *more)

    clone.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, recorded)

    def body(denoiser: GuiderDenoiser, x0: Tensor) -> None:
        noise = torch.randn(x0.shape, generator=step_generator(seed, 0, "inspect")).to(x0)
        for percent, (rows, _) in zip(percents, prompts, strict=True):
            sigma = torch.tensor([float(sampling.percent_to_sigma(percent))]).to(x0)
            of_layers.clear()  # of the checks before the first prediction, or of the last one
            denoiser.denoised(denoiser.noised(x0, noise, sigma), sigma, rows.to(x0))
            maps.append(mean_over_layers(of_layers, (samples.shape[-2], samples.shape[-1])))
            bar.update(1)

    predicting(clone, [prompts[0]], samples, body)
    cell = getattr(model.get_model_object("latent_format"), "spacial_downscale_ratio", 8)  # newer ComfyUI knows it
    found = Maps(torch.cat(maps), percents, cell)
    check_result("maps", found.values)
    return found


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
