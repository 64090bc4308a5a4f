"""SINE's position map on a MODEL, as in training: added after the first convolution, or as rotary positions.

Every evaluation gets the part of the map that it covers: the whole image, the area of a regional prompt, a window of
ComfyUI's context windows, or a tile set by the user.
"""

import copy
import functools
import inspect
import sys
from dataclasses import dataclass
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor, nn

from ...lora.artifact import FineTunedWeights
from ...lora.host.apply import apply_lora
from ...prompt.conditioning import Conditioning
from ...session.session import BOXES, GuiderDenoiser, predicting
from ..position_map import MAX_CELLS, needed_map, position_map, rotary_positions

KEY = "likeness.position_map"
PICTURE = "likeness.picture"  # transformer_options: ([frames,] h, w) of the whole latent
AREAS = "likeness.areas"  # transformer_options: uuid of a regional prompt -> its window
Box = tuple[float, float, float, float]
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
ROPE = "rope_options"  # ComfyUI's name for what moves a network's rotary positions
TOKENS = 4  # per side of the image that asks a model whether it follows them
_follows: dict[type, bool] = {}  # class of a network -> what _is_moved() found


@dataclass(frozen=True)
class PositionMap:
    """The patch. window: (y, x, height, width) of the sampled latent, as fractions of the whole image."""

    cells: int
    interpolation: str
    window: Box = WHOLE

    def __call__(self, h: Tensor, options: dict[str, Any]) -> Tensor:
        """Add the map to h [B, channels, height, width] after block ("input", 0); other blocks are unchanged."""
        if options["block"] != ("input", 0):
            return h
        boxes = options.get(BOXES)
        size = (h.shape[-2], h.shape[-1])
        if boxes is not None:
            maps = position_map(h.shape[1], self.cells, boxes, size, self.interpolation).to(h)
            return h + maps.repeat(h.shape[0] // maps.shape[0], 1, 1, 1)
        chunks = self.windows(options)
        parts = [_cached_map(h.shape[1], self, window, size, h.dtype).to(h.device) for window in chunks]
        if len(set(chunks)) == 1:
            return h + parts[0]
        return h + torch.cat([part.expand(h.shape[0] // len(parts), -1, -1, -1) for part in parts])

    def windows(self, options: dict[str, Any]) -> list[Box]:
        """The part of the whole image that each chunk of the batch covers."""
        visible = _compose(self.window, _context_window(options))
        areas = options.get(AREAS, {})
        return [_compose(visible, areas.get(identity, WHOLE)) for identity in options.get("uuids", [None])]


@dataclass(frozen=True)
class RotaryMap:
    """The same for a transformer: a wrapper of the network that stretches its rotary positions as the map would be."""

    map: PositionMap

    def __call__(self, executor: Any, x: Tensor, t: Tensor, *args: Any, **more: Any) -> Tensor:
        *others, options = args
        boxes, cells = options.get(BOXES), self.map.cells
        windows = [(y, x0, y + h, x0 + w) for y, x0, h, w in self.map.windows(options)]
        places = [[cells * side for side in window] for window in windows] if boxes is None else boxes.tolist()
        if any(place != places[0] for place in places):
            raise ValueError(
                "Prompts of different areas came in one evaluation, and this model has one set of positions for each: "
                "expected are areas of different sizes, or a prompt without areas."
            )
        patch, given = _patch(executor.class_obj.diffusion_model), options.get(ROPE) or {}
        rope = rotary_positions(places[0], (x.shape[-2], x.shape[-1]), patch, given)
        return executor(x, t, *others, {**options, ROPE: rope}, **more)


def _patch(network: nn.Module) -> int:
    """Latent pixels per side of a token."""
    patch: Any = getattr(network, "patch_size", 1)
    return patch if isinstance(patch, int) else patch[-1]


def _compose(outer: Box, part: Box) -> Box:
    """Convert `part` from fractions of `outer` to fractions of the whole image."""
    return (
        outer[0] + part[0] * outer[2],
        outer[1] + part[1] * outer[3],
        part[2] * outer[2],
        part[3] * outer[3],
    )


def _context_window(options: dict[str, Any]) -> Box:
    """The window that ComfyUI's context windows cut along the height or the width, the last two axes."""
    window, image = options.get("context_window"), options.get(PICTURE)
    dim = getattr(window, "dim", None)
    if window is None or image is None or dim not in (len(image), len(image) + 1):
        return WHOLE
    indices = list(window.index_list)
    anchor = getattr(window, "causal_anchor_index", None)  # newer ComfyUI includes the index before the window
    indices += [anchor] if anchor is not None and anchor >= 0 else []
    first, last, whole = min(indices), max(indices) + 1, image[dim - 2]
    start, length = first / whole, (last - first) / whole
    return (start, 0.0, length, 1.0) if dim == len(image) else (0.0, start, 1.0, length)


@functools.lru_cache(maxsize=8)
def _cached_map(channels: int, patch: PositionMap, window: Box, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Cached for later steps, on the CPU so that it holds no device memory after the run."""
    y, x, height, width = (round(value * patch.cells, 6) for value in window)  # 6: a rounding error must not add a cell
    box = torch.tensor([[y, x, y + height, x + width]], dtype=torch.float64)
    with torch.inference_mode(False):  # a later training may use it
        return position_map(channels, patch.cells, box, size, patch.interpolation).to(dtype)


def with_position_map(model: Any, cells: int, interpolation: str, window: Box | None = None) -> Any:
    """A clone of the MODEL with the map.

    window: (y, x, height, width) of the latent to sample, as fractions of the whole image; None for that of a map that
    is there, or all. ValueError for models that cannot have a map, for a map of another grid, which its weights were
    trained with, for too many cells, or a window beyond the image.
    """
    existing = position_map_of(model)
    if existing is not None and (existing.cells, existing.interpolation) != (cells, interpolation):
        raise ValueError(
            f"The model was tuned with a map of {existing.cells} cells, {existing.interpolation}; {cells} cells, "
            f"{interpolation} were asked for: set the same values, or connect the model without a map."
        )
    if not takes_map(model):
        raise ValueError(
            f"A {type(model.model.model_config).__name__} cannot be told where in an image it is, expected is a UNet's "
            "first convolution, or rotary positions that ComfyUI can move (FLUX, Z-Image, Wan): use this model without "
            "a position map."
        )
    if cells > MAX_CELLS:
        raise ValueError(f"The map would have {cells} cells, expected {MAX_CELLS} at most: set fewer cells.")
    window = window or (WHOLE if existing is None else existing.window)
    y, x, height, width = window
    if min(window) < 0 or min(height, width) <= 0 or y + height > 1 + 1e-6 or x + width > 1 + 1e-6:
        raise ValueError(
            f"The window (x {x:g}, y {y:g}, width {width:g}, height {height:g}) is not inside the image: "
            "x + width and y + height end at 1."
        )
    clone, patch = without_position_map(model), PositionMap(cells, interpolation, window)
    if _is_unet(model):
        clone.set_model_input_block_patch(patch)
    else:
        clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, RotaryMap(patch))
    clone.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, _tell_size)
    clone.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, _tell_areas)
    return clone


def without_position_map(model: Any) -> Any:
    clone = model.clone()
    options = clone.model_options["transformer_options"] = copy.copy(clone.model_options["transformer_options"])
    patches = options.get("patches", {})
    if "input_block_patch" in patches:
        others = [patch for patch in patches["input_block_patch"] if not isinstance(patch, PositionMap)]
        options["patches"] = {**patches, "input_block_patch": others}
    for wrapper in (WrappersMP.APPLY_MODEL, WrappersMP.SAMPLER_SAMPLE, WrappersMP.CALC_COND_BATCH):
        clone.remove_wrappers_with_key(wrapper, KEY)
    return clone


def _is_unet(model: Any) -> bool:
    return hasattr(model.model.diffusion_model, "input_blocks")


def takes_map(model: Any, prompt: Conditioning | None = None) -> bool:
    """Whether a MODEL is a UNet, or a network whose code reads ComfyUI's rope options; with a prompt also whether it
    follows them, which predictions tell, once for each class of network.
    """
    network = type(model.model.diffusion_model)
    takes = _is_unet(model) or ROPE in inspect.getsource(sys.modules[network.__module__])
    if takes and prompt and not _is_unet(model) and network not in _follows:
        _follows[network] = _is_moved(model, prompt)
    return takes and (not prompt or _follows.get(network, True))


def _is_moved(model: Any, prompt: Conditioning) -> bool:
    """Whether rope options move the tokens as they say: with their order and their positions both turned over, a
    transformer predicts the same image turned over.
    """
    patch, clone, rope = _patch(model.model.diffusion_model), without_position_map(model), dict[str, float]()
    errors: list[float] = []

    def turned(x: Tensor) -> Tensor:
        return x.unflatten(-2, (-1, patch)).flip(-3).flatten(-3, -2)

    def place(executor: Any, *args: Any, **more: Any) -> Tensor:
        return executor(*args[:-1], {**args[-1], **({ROPE: dict(rope)} if rope else {})}, **more)

    def body(denoiser: GuiderDenoiser, x0: Tensor) -> None:
        x, sigma = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)).to(x0), denoiser.sigmas.median()
        plain, other = denoiser.denoised(x, sigma.to(x0)), denoiser.denoised(turned(x), sigma.to(x0))
        rope.update(scale_y=-1.0, shift_y=TOKENS - 1.0, scale_x=1.0, shift_x=0.0)
        moved = denoiser.denoised(turned(x), sigma.to(x0))
        errors.extend(float((each - turned(plain)).float().norm()) for each in (moved, other))

    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, place)
    latent_format = model.get_model_object("latent_format")
    frame = (1,) * (getattr(latent_format, "latent_dimensions", 2) - 2)
    predicting(clone, prompt, torch.zeros(1, latent_format.latent_channels, *frame, *[TOKENS * patch] * 2), body)
    return errors[0] < errors[1] / 2


def position_map_of(model: Any) -> PositionMap | None:
    patches = model.model_options.get("transformer_options", {}).get("patches", {})
    maps = [patch for patch in patches.get("input_block_patch", []) if isinstance(patch, PositionMap)]
    maps += [each.map for each in model.wrappers.get(WrappersMP.APPLY_MODEL, {}).get(KEY, [])]
    return maps[0] if maps else None


def _tell_size(executor: Any, guider: Any, sigmas: Tensor, extra_args: dict[str, Any], *args: Any, **more: Any) -> Any:
    noise = more["noise"] if "noise" in more else args[1]
    extra_args["model_options"]["transformer_options"][PICTURE] = tuple(noise.shape[2:])  # a copy of this run's own
    return executor(guider, sigmas, extra_args, *args, **more)


def _tell_areas(executor: Any, model: Any, conds: list, x: Tensor, timestep: Tensor, model_options: dict) -> Any:
    height, width = x.shape[-2:]
    areas: dict[Any, Box] = {}
    for entry in (entry for cond in conds if cond is not None for entry in cond):
        if entry.get("area"):
            *_, h, w = entry["area"][: len(entry["area"]) // 2]  # frames come before them
            y, x0 = entry["area"][-2:]
            areas[entry["uuid"]] = (y / height, x0 / width, min(h, height - y) / height, min(w, width - x0) / width)
    if areas:
        options = {**model_options.get("transformer_options", {}), AREAS: areas}
        model_options = {**model_options, "transformer_options": options}
    return executor(model, conds, x, timestep, model_options)


def apply_fine_tune(tuned: FineTunedWeights, model: Any, clip: Any | None, strength: float) -> tuple[Any, Any | None]:
    """As apply_lora(), with the position map that the weights need; strength 0 returns both unchanged."""
    patched, encoder = apply_lora(tuned, model, clip, strength)
    needed = None if strength == 0.0 else needed_map(tuned)
    return patched if needed is None else with_position_map(patched, *needed), encoder
