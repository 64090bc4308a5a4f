"""Does guided sampling come back to an inverted image, by which way, and at what cost? On toyworld, counted.

Held-out scenes are encoded, inverted with their captions and sampled again at cfg 7.5, 50 steps of euler on
ddim_uniform. PSNR is measured against the source image, for the autoencoder's round trip too: that is the most that any
way can reach. Passes of the UNet are counted at the network itself, each entry of a batch as one; a null-text run also
counts the session's probe.

    python toolbox/_load.py benchmarks.effect_inversion --out benchmarks/results/effect_inversion.json
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ..core.inversion.ddim import ITERATIONS
from ..core.inversion.null_text import NullTextSettings
from ..toyworld import world
from . import frame, subjects

if TYPE_CHECKING:
    from ..core.inversion.ddim import Label
    from ..core.inversion.null_text import Method, Start

ROUND_TRIP, PUBLISHED, CHEAP = "autoencoder", "null-text, published", "null-text from the prompt"
LABELS: tuple[Label, ...] = ("published", "fixed point")  # the ways back are from the first
WAYS: dict[str, tuple[Method, Start]] = {
    "negative prompt": ("negative prompt", "prompt"),
    "direct": ("direct", "empty prompt"),
    PUBLISHED: ("null-text", "empty prompt"),
    CHEAP: ("null-text", "prompt"),
}
LOST_GATE = 0.5  # dB below the autoencoder's round trip
EQUAL_GATE = 0.1  # dB: the cheap form may be so much below the published one
PASSES_GATE = 3.0


@dataclass(frozen=True)
class Settings:
    """The published ones."""

    cfg: float = 7.5
    steps: int = 50
    scheduler: str = "ddim_uniform"
    ways: tuple[str, ...] = field(default=tuple(WAYS), metadata={"choices": tuple(WAYS)})


# Null-text optimisation takes hundreds of updates an image; the flow transformer is measured without it.
WORLDS = {
    "unet": Settings(),
    "flow": Settings(cfg=4.0, scheduler="simple", ways=("negative prompt", "direct")),
}


@dataclass(frozen=True)
class Scene:
    """A held-out image and its caption."""

    seed: int
    image: Any
    caption: str


def scenes(count: int) -> list[Scene]:
    """The first `count` held-out scenes, [1, 96, 96, 3]."""
    drawn = [world.scene(seed, from_held_out=True) for seed in range(count)]
    return [Scene(seed, torch.from_numpy(s.image)[None].float() / 255, s.caption) for seed, s in enumerate(drawn)]


@dataclass
class Count:
    """Passes of one image through the UNet."""

    forward: int = 0
    backward: int = 0


@contextlib.contextmanager
def counted(unet: Any) -> Iterator[Count]:
    """Count what goes through the network, and what comes back."""
    count = Count()

    def seen(_module: Any, _inputs: Any, output: Any) -> None:
        entries = output.shape[0]
        count.forward += entries
        if output.requires_grad:

            def came_back(_gradient: Any) -> None:
                count.backward += entries

            output.register_hook(came_back)

    handle = unet.register_forward_hook(seen)
    try:
        yield count
    finally:
        handle.remove()


class Bench(subjects.Bench):
    """The pack's own inversion and ways back on toyworld."""

    def __init__(self, settings: Settings, world: str = subjects.NARROW[0]) -> None:
        super().__init__(world)
        self.settings, self.empty = settings, self.conditioning("")
        self.levels = self.sigmas(settings.steps, settings.scheduler)

    def measured(self, work: Callable[..., Any], *given: Any) -> tuple[Any, dict[str, float]]:
        """What work(*given) returns, with its seconds and passes."""
        with torch.inference_mode(), counted(self.world.model.model.diffusion_model) as count:
            began = time.perf_counter()
            found = work(*given)
            seconds = time.perf_counter() - began
        return found, {"seconds": seconds, **vars(count)}

    @torch.inference_mode()
    def again(self, model: Any, positive: list, negative: list, start: Any, cfg: float) -> Any:
        """The image [1, 96, 96, 3] that a start leads to."""
        import comfy.samplers

        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(positive, negative)
        guider.set_cfg(cfg)
        latent, noise = start
        sampler, given = comfy.samplers.sampler_object("euler"), noise.generate_noise(latent)
        made = guider.sample(given, latent["samples"], sampler, self.levels, disable_pbar=True, seed=0)
        return self.world.vae.decode(made)

    def row(self, scene: Scene) -> dict[str, Any]:
        """All ways back to one scene."""
        from ..core.inversion.host.ddim import invert_image, start_of
        from ..core.inversion.host.null_text import prepare_reconstruction
        from ..core.session.images import ImageSource

        model, cfg, positive = self.world.model, self.settings.cfg, self.conditioning(scene.caption)

        def psnr(found: Any) -> float:
            return float(-10 * (found - scene.image).square().mean().log10())

        with torch.inference_mode():
            latent = {"samples": self.world.vae.encode(scene.image)}
            row: dict[str, Any] = {ROUND_TRIP: psnr(self.world.vae.decode(latent["samples"]))}
        for label in reversed(LABELS):
            trajectory, cost = self.measured(
                invert_image, model, positive, ImageSource(latent), self.levels, label, ITERATIONS
            )
            start = start_of(model, trajectory)
            row[f"{label}, unguided"] = {"psnr": psnr(self.again(model, positive, self.empty, start, 1.0)), **cost}
        row["plain"] = {"psnr": psnr(self.again(model, positive, self.empty, start, cfg))}
        for name in self.settings.ways:
            method, first = WAYS[name]
            (negative, losses, _, pinned), cost = self.measured(
                prepare_reconstruction, model, positive, self.empty, trajectory, method, NullTextSettings(cfg), first
            )
            image = self.again(pinned, positive, negative, start, cfg)
            row[name] = {"psnr": psnr(image), "updates": len(losses or []), **cost}
        return row


def summary(rows: frame.Rows) -> dict[str, Any]:
    """Means over the images, the distance to the round trip with its interval, and the gates."""
    mean: dict[str, Any] = frame.means(rows)
    for name in mean:
        lost = [row[ROUND_TRIP] - row[name]["psnr"] for row in rows]
        mean[name]["below the round trip"] = {**frame.interval(lost), "worst": max(lost)}
    figures = {"pictures": len(rows), ROUND_TRIP: frame.mean(row[ROUND_TRIP] for row in rows), "mean": mean}
    if CHEAP not in mean:
        return frame.gated(figures, {"direct comes back": mean["direct"]["below the round trip"]["mean"] <= LOST_GATE})
    fewer = mean[PUBLISHED]["backward"] / mean[CHEAP]["backward"]
    gates = {
        "null-text comes back": mean[PUBLISHED]["below the round trip"]["mean"] <= LOST_GATE,
        "and from the prompt": mean[CHEAP]["below the round trip"]["mean"] <= LOST_GATE,
        "from the prompt as near": mean[PUBLISHED]["psnr"] - mean[CHEAP]["psnr"] <= EQUAL_GATE,
        "at a third of the backward passes": fewer >= PASSES_GATE,
    }
    return frame.gated({**figures, "backward passes, published over cheap": fewer}, gates)


def main(arguments: list[str]) -> int:
    """Print and write the figures; exit 1 when a gate is missed."""
    run = frame.Run("effect_inversion", arguments, WORLDS, pictures=24)
    chosen = run.chosen(scenes)
    rows = run.rows(chosen, lambda: Bench(run.settings, run.world), Bench.row, lambda scene: {"caption": scene.caption})
    return run.judged(rows, summary(rows), settings={**asdict(run.settings), "threads": run.options.threads})
