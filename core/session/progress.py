"""What the page shows of a run: progress bar, latent preview, the loss curve of the node's widget, and warnings."""

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import comfy.model_management as mm
import comfy.utils
import latent_preview
from comfy_execution.utils import get_executing_context
from PIL import Image
from server import PromptServer
from torch import Tensor

from ..fit.fit import curve, running_mean
from .texts import LOGGER

EVENT, WARNING = "likeness.progress", "likeness.warning"
PREVIEW_SIDE = 512
SHARE = 0.04  # of the time of a training, for images of what was learned so far
INTERVAL = 1.0  # seconds between two images or curves
_learned: dict[str, float | None] = {}  # by node: the seconds of its last run, None of one from another process


class Steps:
    """Progress of one or more samplings or inversions that share a bar, with a preview every `every` steps."""

    def __init__(self, model: Any, total: int, every: int = 1) -> None:
        self._bar, self._total, self._done = comfy.utils.ProgressBar(total), total, 0
        self._previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)
        self._every = every

    def step(self, latent: Tensor | None = None) -> None:
        """Count one step; latent [B, C, h, w] in the model's own space. Raises ComfyUI's interrupt."""
        mm.throw_exception_if_processing_interrupted()
        self._done += 1
        preview = self._preview(latent if self._done % self._every == 0 else None)
        self._bar.update_absolute(self._done, self._total, preview)

    def _preview(self, latent: Tensor | None) -> Any | None:
        """A latent's preview image for the progress bar; None without a previewer or a latent."""
        if self._previewer is None or latent is None:
            return None
        return self._previewer.decode_latent_to_preview_image("JPEG", latent[:1].float())


class Sparingly:
    """Repeats a costly call so seldom that it takes at most SHARE of the time; between, its last value is returned."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make, self._value, self._next = make, None, 0.0

    def __call__(self) -> Any:
        begun = time.monotonic()
        if begun >= self._next:
            self._value = self._make()
            done = time.monotonic()
            self._next = done + (done - begun) / SHARE
        return self._value


class Progress(Steps):
    """Progress of one node's run; done: the steps of a stored run. update() raises ComfyUI's interrupt on a cancel."""

    def __init__(self, model: Any, total: int, done: int) -> None:
        super().__init__(model, total)
        context = get_executing_context()  # none outside of a node
        self._node = None if context is None else context.node_id
        self._resumed, self._last, self._begun = done, 0.0, time.monotonic()
        self._so_far = False

    def update(
        self, losses: list[float], denoised: Tensor | None = None, image: Tensor | None = None, so_far: bool = False
    ) -> None:
        """Show the state after an update; images and curves at most once a second, and at the end.

        image: an image [3, H, W] in 0..1 to show instead of a latent. so_far: the latent is an image of what was
        learned, which the page says.
        """
        mm.throw_exception_if_processing_interrupted()
        step, now = len(losses), time.monotonic()
        if now - self._last < INTERVAL and step < self._total:
            self._bar.update_absolute(step)
            return
        self._last, self._so_far = now, so_far
        preview = self._preview(denoised)
        if image is not None:
            pixels = (255 * image.movedim(0, -1)).round().byte().cpu().numpy()
            preview = ("JPEG", Image.fromarray(pixels), PREVIEW_SIDE)
        self._bar.update_absolute(step, self._total, preview)
        self.curve(losses)

    def finish(self, losses: list[float], seconds: float | None) -> None:
        """Show the end of a run, also of one returned from disk. seconds: what it took in all, where that is known."""
        mm.throw_exception_if_processing_interrupted()
        self._bar.update_absolute(max(len(losses), self._total), self._total)
        self.curve(losses)
        _learned[str(self._node)] = seconds

    def curve(self, losses: list[float]) -> None:
        """Send the loss curve to the page."""
        if not losses:
            return
        made, left = max(1, len(losses) - self._resumed), max(0, self._total - len(losses))
        message = {
            "node": str(self._node),
            "step": len(losses),
            "steps": self._total,
            "loss": losses[-1],
            "losses": curve(losses),
            "mean": curve(running_mean(losses)),
            "left": left * (time.monotonic() - self._begun) / made,  # seconds, at the pace of this run so far
            "resumed": self._resumed,
            "so_far": self._so_far,
        }
        _send(EVENT, message)


def seconds_of(name: str, node: str, prompt: Mapping[str, Any]) -> float | None:
    """What the trainings in front of a node of a prompt took whose titles begin with "name:"; None if it is not known.

    prompt: in ComfyUI's API form, with the titles that the page adds.
    """
    ahead = [node]
    for each in ahead:  # which grows meanwhile
        for value in prompt.get(each, {}).get("inputs", {}).values():
            if isinstance(value, list) and value and str(value[0]) not in ahead:
                ahead.append(str(value[0]))
    metas = {each: prompt[each].get("_meta") for each in prompt.keys() & _learned.keys() & set(ahead)}
    titles = {each: str(meta.get("title")) for each, meta in metas.items() if isinstance(meta, dict)}
    seconds = [_learned[each] for each, title in titles.items() if title.startswith(f"{name}:")]
    known = [each for each in seconds if each is not None]
    return sum(known) if known and len(known) == len(seconds) else None


class _WarningsInPage(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        _send(WARNING, {"text": record.getMessage()})


_PAGE = _WarningsInPage(logging.WARNING)


def show_warnings() -> None:
    """Show the pack's warnings in the page too, since few of its users read the log. May be called repeatedly."""
    logging.getLogger(LOGGER).addHandler(_PAGE)


def _send(event: str, message: dict[str, Any]) -> None:
    """Send to the page that queued what runs; nothing outside of a running ComfyUI."""
    server = getattr(PromptServer, "instance", None)
    if server is not None:
        server.send_sync(event, message, server.client_id)
