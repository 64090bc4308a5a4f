"""What a long node does before its first update, and when it is queued again, at 0.86, 2.6 and 12 G weights.

The models have the published layouts, with weights that are views of one small buffer, as a loader node leaves them.
Their networks answer at once, without computing: left is what the pack and ComfyUI do around them. Time inside of
ComfyUI's own loading is told apart. A real start also has one prediction with its backward pass, as long as an update.
Seconds are the process's own, on one thread; the first of two runs of a node trains two updates, and the second is
served. --profile names where the time goes.

    python toolbox/_load.py benchmarks.start_cost --out benchmarks/results/start_cost.json
"""

from __future__ import annotations

import contextlib
import cProfile
import pstats
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ..tests.contract.setting import run_node
from . import frame, hosting, sizes
from .cost_similarity import dino

GATE = 1.0  # seconds beside ComfyUI's own loading
FAMILIES = ("SD1.5", "SDXL", "FLUX.1")
SIDE = 64  # pixels of the images: what a VAE computes is no part of this
BYTES_OF_ALL = 16  # of the machine's memory, for each weight that is trained
SHOWN = 6  # functions of a profile


class Watch:
    """When the first update begins, and what ComfyUI's loading took until then."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        self.began, self.loading, self.start = time.process_time(), 0.0, (0.0, 0.0)
        self.first = True

    def reached(self) -> None:
        """The first update begins."""
        if self.first:
            self.first, self.start = False, (time.process_time() - self.began, self.loading)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Within it, trainings and ComfyUI's loading report."""
        import comfy.model_management as mm

        from ..core.session import job

        train, load = job.train, mm.load_models_gpu

        def trained(*arguments: Any, **more: Any) -> Any:
            self.reached()
            return train(*arguments, **more)

        def loaded(*arguments: Any, **more: Any) -> Any:
            began = time.process_time()
            try:
                return load(*arguments, **more)
            finally:
                self.loading += time.process_time() - began

        job.train, mm.load_models_gpu = trained, loaded  # ty: ignore[invalid-assignment]
        try:
            yield
        finally:
            job.train, mm.load_models_gpu = train, load


class Idle:
    """In front of a network's class: it answers at once, with a gradient to every token and to something trained."""

    def forward(self, x: torch.Tensor, *_args: Any, context: torch.Tensor | None = None, **_more: Any) -> torch.Tensor:
        network: Any = self
        leaf = next((value for value in network.parameters() if value.requires_grad), None)
        hooked = next(
            (part for part in network.modules() if part._forward_hooks and hasattr(part, "in_features")), None
        )
        out = x if context is None else x + context.mean().to(x)
        out = out if leaf is None else out + leaf.mean().to(x)
        return out if hooked is None else out + hooked(x.new_ones(1, hooked.in_features)).mean()


def model_of_views(family: Any, how: sizes.Precision) -> Any:
    """A MODEL whose weights are views of one buffer, and whose network is idle."""
    import comfy.model_patcher

    cpu = torch.device("cpu")
    with torch.inference_mode():
        base = sizes.network_of(family, how, torch.device("meta"))
        network = base.diffusion_model
        largest = max(value.numel() for value in network.parameters())
        buffer = (0.02 * torch.randn(largest)).to(how.stored)
        for part in network.modules():
            for name, value in part._parameters.items():
                if value is not None:
                    view = buffer[: value.numel()].view(value.shape)
                    part._parameters[name] = torch.nn.Parameter(view, requires_grad=False)
        base.device = cpu
        network.__class__ = type(type(network).__name__, (Idle, type(network)), {})
    return comfy.model_patcher.ModelPatcher(base, cpu, cpu)


class Bench:
    """A family at its published size, with what its nodes are given."""

    def __init__(self, name: str) -> None:
        self.name, family = name, sizes.families(tiny=False)[name]
        self.model = model_of_views(family, sizes.PRECISIONS["bf16"])
        self.weights = sum(value.numel() for value in self.model.model.diffusion_model.parameters())
        self.vae, self.vision = sizes.autoencoder(family, tiny=True), dino(2, 64)
        self.positive, self.negative = family.prompt(1), family.prompt(3)
        generator = torch.Generator().manual_seed(0)
        self.latent = {"samples": torch.randn(1, family.latent[1], SIDE // 8, SIDE // 8, generator=generator)}
        self.image = torch.rand(1, SIDE, SIDE, 3, generator=generator)

    def nodes(self) -> Iterator[tuple[str, Callable[[], Any]]]:
        """Each long node, ready to be run."""
        from comfy_extras.nodes_custom_sampler import Noise_RandomNoise

        from ..nodes.embedding import LikenessRefineEmbedding, LikenessTrainEmbedding
        from ..nodes.fine_tune import LikenessFineTune
        from ..nodes.inversion import LikenessInvert, LikenessNullText
        from ..nodes.optimize_lora import LikenessOptimizeLora
        from ..nodes.reference import LikenessReferenceGuide
        from ..nodes.similarity import LikenessSimilarity

        model, prompts = {"model": self.model, "positive": self.positive}, {"negative": self.negative}
        tune = {"image": self.image, "vae": self.vae, "steps": 2, "resolution": SIDE, "patches": False}
        embedding = {"latent": self.latent, "steps": 2, "preview_steps": 0}
        yield "Train Subject Embedding", lambda: ran(LikenessTrainEmbedding, **model, **embedding)
        yield "Fine-Tune On Image, LoRA", lambda: ran(LikenessFineTune, **model, **tune)
        if sizes.free_ram() > BYTES_OF_ALL * self.weights:
            yield (
                "Fine-Tune On Image, all weights",
                lambda: ran(LikenessFineTune, **model, **tune, method="full weights", learning_rate=1e-6),
            )
        alike = ran(LikenessSimilarity, vision=self.vision, image=self.image)[0]
        levels = torch.tensor([float(self.model.get_model_object("model_sampling").sigma_max), 0.0])
        siso = {"similarity": alike, "vae": self.vae, "latent": self.latent, "sigmas": levels, "iterations": 2}
        yield "Optimize LoRA", lambda: ran(LikenessOptimizeLora, **model, **siso)
        sigmas = {"sigmas": hosting.levels(self.model, 4, "simple")}
        trained = ran(LikenessTrainEmbedding, **model, **embedding)[0]
        stages = {"embedding": trained, "latent": self.latent, "inner_steps": 1}
        yield "Refine Subject Embedding", lambda: ran(LikenessRefineEmbedding, **model, **prompts, **sigmas, **stages)
        trajectory = ran(LikenessInvert, **model, **sigmas, latent=self.latent)[0]
        yield (
            "Null-Text",
            lambda: ran(LikenessNullText, **model, **prompts, trajectory=trajectory, inner_steps=1),
        )
        mask = torch.zeros(1, SIDE, SIDE)
        mask[:, 16:48, 16:48] = 1
        noise = Noise_RandomNoise(0)
        reference = {"trajectory": trajectory, "mask": mask, "noise": noise, "inner_steps": 1}
        yield (
            "Reference Guide",
            lambda: ran(LikenessReferenceGuide, **model, **prompts, **reference),
        )


def ran(node: Any, **inputs: Any) -> tuple:
    """A node with its defaults and these inputs."""
    defaults = {}
    for each in node.define_schema().inputs:
        if not each.optional and each.id not in inputs:
            options = getattr(each, "options", None)
            defaults[each.id] = each.default if each.default is not None or not options else options[0]
    return run_node(node, **defaults, **inputs)


def measured(run: Callable[[], Any], watch: Watch) -> dict[str, float]:
    """A first run, and the same again."""
    watch.begin()
    run()
    start, loading = watch.start
    watch.begin()
    run()
    again = time.process_time() - watch.began
    return {"start": start, "ComfyUI's loading": loading, "beside it": start - loading, "queued again": again}


def profiled(run: Callable[[], Any]) -> list[str]:
    """The functions of the pack and of torch that take the most time, each with what it calls itself."""
    import folder_paths

    folder_paths.set_user_directory(tempfile.mkdtemp())  # nothing is served
    profile = cProfile.Profile()
    profile.runcall(run)
    stats = pstats.Stats(profile).stats  # ty: ignore[missing-attribute]
    most = sorted(stats.items(), key=lambda entry: -entry[1][2])[:SHOWN]
    return [
        f"{own:.3f} s in {Path(file).name}:{line} {name}, {n} times" for (file, line, name), (_, n, own, *_) in most
    ]


def figures(watch: Watch, names: list[str], profile: bool) -> Iterator[tuple[str, dict[str, float]]]:
    """All of them."""
    import comfy.model_management as mm

    for name in names:
        bench = Bench(name)
        for node, run in bench.nodes():
            yield f"{node}, {bench.weights / 1e9:.2f} G weights ({name})", measured(run, watch)
            if profile:
                frame.say("\n".join(f"    {line}" for line in profiled(run)))
        del bench
        mm.unload_all_models()


def main(arguments: list[str]) -> int:
    """Print the table; exit 1 when a gate is missed."""
    options = {
        "--models": {"nargs": "+", "choices": FAMILIES, "default": list(FAMILIES)},
        "--profile": {"action": "store_true", "help": "run each once more and show where its time goes"},
    }
    run = frame.Run("start_cost", arguments, options=options, threads=1)
    watch = Watch()
    with watch.watching():
        found = run.table(figures(watch, run.options.models, run.options.profile))
    gates = {
        f"{name}: {what}": values[what] <= GATE
        for name, values in found.items()
        for what in ("beside it", "queued again")
    }
    return run.costs(found, gates)
