"""What benchmarks.gpu measures: each method of the pack on one model, through the pack's own ways in."""

from __future__ import annotations

import contextlib
import functools
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from . import frame, hosting, sizes
from .cost_similarity import dino, peak

SPAN, RUNS = 6.0, 5  # seconds of a part's repetitions, and how many
PAUSE = 0.02  # seconds between two looks at the memory
GB = 2**30


class Meter:
    """Seconds and peak memory of what runs, on an accelerator or the CPU. streamed: ComfyUI's dynamic VRAM is on, which
    torch's allocator does not see, so that the card itself is asked.
    """

    def __init__(self, device: torch.device, weights: Callable[[], int], streamed: bool = False) -> None:
        self.weights, self.streamed = weights, streamed
        self.backend = {"cuda": torch.cuda, "xpu": getattr(torch, "xpu", None)}.get(device.type)
        self.seconds, self.peak, self.runs = 0.0, 0.0, 0

    def measure(self, run: Callable[[], Any], units: int = 1) -> None:
        """Run once to warm up, then RUNS times, or for SPAN seconds (on a CPU once); the median time of a unit."""
        if self.backend:
            self.backend.reset_peak_memory_stats()
            with self.watched() as most:
                run()
                self.backend.synchronize()
            held = most() if self.streamed else self.backend.max_memory_allocated()
        else:
            held = peak(run) + self.weights()
        times: list[float] = []
        while len(times) < (RUNS if self.backend else 1) and sum(times) < SPAN:
            began = time.perf_counter()
            run()
            if self.backend:
                self.backend.synchronize()
            times.append(time.perf_counter() - began)
        self.seconds, self.runs, self.peak = statistics.median(times) / units, len(times), held / GB

    @contextlib.contextmanager
    def watched(self) -> Iterator[Callable[[], int]]:
        """A function that tells the most of the card's memory that was in use within the block."""
        used, stop = [0], threading.Event()

        def look() -> None:
            while not stop.wait(PAUSE):
                free, total = torch.cuda.mem_get_info()
                used.append(total - free)

        thread = threading.Thread(target=look, daemon=True)
        if self.streamed:
            thread.start()
        try:
            yield lambda: max(used)
        finally:
            stop.set()


@dataclass(frozen=True)
class Part:
    """What is measured: a method of Bench, its arguments, and what a unit of it is."""

    title: str
    method: str
    unit: str
    how: dict[str, Any]
    of: tuple[str, ...] = ()  # the families; none: all


def part(title: str, method: str, unit: str, *of: str, **how: Any) -> Part:
    return Part(title, method, unit, how, of)


UNETS = ("SD1.5", "SDXL")
PARTS = (  # by worth
    part("HiPer", "hiper", "update"),
    part("SINE, LoRA", "fine_tune", "update"),
    part("SINE, LoRA, checkpointing", "fine_tune", "update", checkpointing=True),
    part("plain sampling", "sampling", "step"),
    part("SINE's guidance", "sampling", "step", guided=True),
    part("SISO with DINOv2, checkpointing", "siso", "iteration", checkpointing=True),
    part("SISO with DINOv2", "siso", "iteration"),
    part("HiPer, checkpointing", "hiper", "update", checkpointing=True),
    part("inversion", "inversion", "step"),
    part("null-text", "null_text", "update", "SD1.5", "SDXL", "Z-Image"),
    part("EZIGen, two loops of 20 steps", "staged", "image", *UNETS),
    part("SINE, all weights, checkpointing", "fine_tune", "update", *UNETS, full=True, checkpointing=True),
    part("SINE, all weights", "fine_tune", "update", "SD1.5", full=True),
    part("plain sampling, positive and negative one by one", "sampling", "step", apart=True),
    part("HiPer, channels last", "hiper", "update", *UNETS, channels_last=True),
    part("plain sampling, channels last", "sampling", "step", *UNETS, channels_last=True),
)
FIRST = ("hiper", "sampling", "siso")  # in fp8 and under dynamic VRAM, in their first forms


def parts_of(family: str, weights: str, streamed: bool) -> list[Part]:
    """The parts of a model."""
    parts = [each for each in PARTS if not each.of or family in each.of]
    if weights == "bf16" and not streamed:
        return parts
    return [each for each in parts if each.method in FIRST and not each.how.keys() - {"guided", "checkpointing"}]


class Bench:
    """One model in one precision, with prompts and an image; each part is a method that gives its Meter what to run."""

    def __init__(self, name: str, how: sizes.Precision, tiny: bool) -> None:
        self.tiny, self.family = tiny, sizes.families(tiny)[name]
        self.model = sizes.model_of(self.family, how)
        self.positive, self.negative = self.family.prompt(1), self.family.prompt(3)
        generator = torch.Generator().manual_seed(0)
        self.latent = torch.randn(self.family.latent, generator=generator)
        self.image = torch.rand(1, self.family.image, self.family.image, 3, generator=generator)
        self.steps = 2 if tiny else 4

    def weights(self) -> int:
        """Bytes of what is loaded."""
        import comfy.model_management as mm

        return sum(each.model.model_size() for each in mm.current_loaded_models if each.model is not None)

    @functools.cached_property
    def vae(self) -> Any:
        return sizes.autoencoder(self.family, self.tiny)

    @functools.cached_property
    def vision(self) -> Any:
        return dino(2, 64) if self.tiny else dino(24, 1024)

    def trained(self, run: Callable[[], Any], meter: Meter, wrap: Callable[[], Any] | None = None) -> None:
        """Measure the updates of a training that run() begins."""

        def measure(fit: Any) -> None:
            with wrap() if wrap else contextlib.nullcontext():
                meter.measure(fit.update)

        with frame.measured_training(measure):
            run()

    def hiper(self, meter: Meter, checkpointing: bool = False, channels_last: bool = False) -> None:
        from ..core.embedding.hiper import HiPerSettings
        from ..core.embedding.host.train import Schedule, train_embedding
        from ..core.session.checkpointing import checkpointed
        from ..core.session.images import TrainingImages

        images, network = TrainingImages(self.latent, None), self.model.model.diffusion_model
        with self.memory_format(channels_last):
            self.trained(
                lambda: train_embedding(self.model, self.positive, images, HiPerSettings(), Schedule()),
                meter,
                (lambda: checkpointed(network)) if checkpointing else None,
            )

    def fine_tune(self, meter: Meter, checkpointing: bool = False, full: bool = False) -> None:
        from ..core.sine.fine_tune import FineTuneSettings
        from ..core.sine.host import fine_tune as host
        from ..core.sine.host.crops import CropSettings

        data = host.FineTuneData(self.image, "photo of a sks dog", positive=self.positive)
        method = host.FULL if full else host.LORA
        plan = host.FineTunePlan(CropSettings(self.family.image), method, checkpointing=checkpointing)
        settings = FineTuneSettings(1e-9)
        self.trained(lambda: host.fine_tune(self.model, self.vae, data, plan, settings), meter)

    def siso(self, meter: Meter, checkpointing: bool = False) -> None:
        from ..core.siso.host import optimize_lora as host
        from ..core.siso.host.similarity import Similarity, similarity_part
        from ..core.siso.siso import SisoSettings

        levels = torch.tensor([float(self.model.get_model_object("model_sampling").sigma_max), 0.0])
        self.trained(
            lambda: host.optimize_lora(
                host.SisoJob(
                    host.Generator(self.model, self.vae, self.positive),
                    Similarity((similarity_part(self.vision, 1.0, self.image),)),
                    host.Sampling(torch.zeros_like(self.latent), levels, 0),
                    host.SisoPlan(checkpointing=checkpointing),
                    SisoSettings(1e-9),
                )
            ),
            meter,
        )

    def tuned(self) -> Any:
        """The model with a LoRA on its attention."""
        import comfy.sd

        from ..core.lora.host.layers import network_layers
        from ..core.lora.low_rank import new_adapters

        adapters = new_adapters(network_layers(self.model.model), 16, 0)
        lora: dict[str, Any] = {}
        for name, adapter in adapters.items():
            torch.nn.init.constant_(adapter.up, 1e-4)
            lora |= adapter.tensors(name)
        return comfy.sd.load_lora_for_models(self.model, None, lora, 1.0, 0.0)[0]

    def sampling(self, meter: Meter, guided: bool = False, apart: bool = False, channels_last: bool = False) -> None:
        import comfy.sample

        from ..core.sine.host.guidance import SubjectModel, with_guidance

        model = self.model
        if guided:
            model = with_guidance(model, [SubjectModel(self.tuned(), self.negative, 0.3)])
        model = sizes.one_by_one(model) if apart else model
        prompts, zeros = (self.positive, self.negative), torch.zeros_like(self.latent)

        def run() -> None:
            comfy.sample.sample(
                model, self.latent, self.steps, 4.0, "euler", "simple", *prompts, zeros, disable_pbar=True, seed=0
            )

        with torch.inference_mode(), self.memory_format(channels_last):
            meter.measure(run, self.steps)

    def inverted(self) -> Any:
        """The trajectory of the latent."""
        from ..core.inversion.host.ddim import invert_image
        from ..core.session.images import ImageSource

        sigmas = hosting.levels(self.model, self.steps, "simple")
        source = ImageSource(latent={"samples": self.latent})
        return invert_image(self.model, self.positive, source, sigmas, "published", 0)

    def inversion(self, meter: Meter) -> None:
        with torch.inference_mode():
            meter.measure(self.inverted, self.steps)

    def null_text(self, meter: Meter) -> None:
        from ..core.inversion.host.null_text import prepare_reconstruction
        from ..core.inversion.null_text import NullTextSettings

        with torch.inference_mode():
            trajectory = self.inverted()
        settings = NullTextSettings(4.0, 1 << 30, 1e-9, epsilon=0.0)
        prompts = (self.positive, self.negative)
        self.trained(
            lambda: prepare_reconstruction(self.model, *prompts, trajectory, "null-text", settings, "prompt"), meter
        )

    def staged(self, meter: Meter) -> None:
        from ..core.ezigen.artifact import pack_adapter
        from ..core.ezigen.host.adapter import encode_subject
        from ..core.ezigen.host.layers import new_adapter
        from ..core.ezigen.host.staged import StagedSampling, sample_staged
        from ..core.ezigen.staged import Loops

        adapter = pack_adapter(new_adapter(self.model.model), {})
        models, prompts = (self.model, self.vae, adapter), (self.positive, self.negative)
        with torch.inference_mode():
            subject = encode_subject(self.model, self.vae, self.positive, self.image, 0)
            steps = 5 if self.tiny else 20
            stages = StagedSampling(*models, subject, *prompts, steps=steps, loops=Loops(2, 2))
            meter.measure(lambda: sample_staged(stages, self.latent))

    def memory_format(self, channels_last: bool) -> Any:
        """A context with the network's weights in that order."""
        network = self.model.model.diffusion_model

        @contextlib.contextmanager
        def reordered() -> Iterator[None]:
            with torch.inference_mode():
                network.to(memory_format=torch.channels_last)
            try:
                yield
            finally:
                with torch.inference_mode():
                    network.to(memory_format=torch.contiguous_format)

        return reordered() if channels_last else contextlib.nullcontext()
