"""What EZIGen's adapter costs beside the bare modules: the loops of the staged sampler, and a step of training.

A bare loop: the same evaluations of the same UNet with the adapter in it (two prompts in one batch), the DDPM update,
one way through the autoencoder and one comparison of two images by the vision model, without ComfyUI's sampler and
guider. A bare step: the UNet on the subject's image without a gradient, the UNet with the adapter on the noisy one,
backward, clipping and AdamW, without draws and folders, in the node's own session. Toyworld in its wide form, at 96 px.

Counted: how often the UNet, the autoencoder and the vision model are asked. A subject's features are made once, by one
evaluation for each of its images, and every sampling after that asks the UNet only for its own steps.

    python toolbox/_load.py benchmarks.cost_adapter --out benchmarks/results/cost_adapter.json
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ..core.ezigen.adapter import batch_tokens
from ..core.ezigen.artifact import StoredAdapter, read_adapter
from ..core.ezigen.staged import Loops, split
from ..core.ezigen.subject_pairs import PairFolder
from ..core.ezigen.train import MAX_NORM, TrainingSettings, optimizer
from ..toyworld import assets, widen, world
from ..toyworld.vision_models import build_vision_folders
from . import frame, hosting
from .frame import by_turns

SIDE = 96
LOOP_GATE, STEP_GATE = 1.05, 1.15


@dataclass(frozen=True)
class Settings:
    """Of the staged sampling, and how often each is timed. ratio: the part of the steps in which the adapter is on."""

    steps: int = 20
    ratio: float = 0.4
    cfg: float = 4.0
    loops: int = 2
    rounds: int = 20


class Bench:
    """Toyworld with its adapter, a subject, a prompt and a vision model."""

    def __init__(self, base: Path, settings: Settings, adapter: Path | None) -> None:
        from ..core.ezigen.host.adapter import prepare_images
        from ..core.vision.host.vision import load_vision

        self.settings = settings
        self.model, clip, self.vae = hosting.small_world(base)
        narrow = assets.read("adapter") if adapter is None else read_adapter(adapter).tensors
        self.adapter = StoredAdapter({name: each.float() for name, each in widen.widen_adapter(narrow).items()}, {})
        self.vision = load_vision(build_vision_folders(base / "models" / "likeness_vision")["small_world_dino"])
        self.clip, prompts = clip, ("a photo of a dog", "a photo of a dog in the snow", "")
        self.about, self.positive, self.empty = hosting.encoded(clip, *prompts)
        pixels, mask = world.render(world.identity(1, "dog"), "grass", 1)
        self.image, self.mask = (torch.from_numpy(each)[None].float() / 255 for each in (pixels, mask))
        self.cut_out = prepare_images(self.image, self.mask, SIDE, 0.06)

    @torch.inference_mode()
    def subject(self) -> Any:
        """The subject, encoded."""
        from ..core.ezigen.host.adapter import encode_subject

        return encode_subject(self.model, self.vae, self.about, self.cut_out, 0)

    @torch.inference_mode()
    def staged(self, subject: Any, loops: int, start: Any = None) -> None:
        """The pack's own staged sampling, or its loops alone where an image is there to start from."""
        from ..core.ezigen.host.staged import StagedSampling, sample_staged

        how, inputs = self.settings, (self.model, self.vae, self.adapter, subject, self.positive, self.empty)
        stages = StagedSampling(*inputs, self.vision, 0, how.steps, how.cfg, how.ratio, Loops(loops, loops))
        sample_staged(stages, torch.zeros(1, 4, SIDE // 8, SIDE // 8), start)

    def bare_loop(self, subject: Any) -> Callable[[], None]:
        """A loop on the modules themselves."""
        from comfy.k_diffusion.sampling import DDPMSampler_step

        from ..core.ezigen.host.adapter import load_patcher
        from ..core.ezigen.host.layers import middle_patch, places
        from ..core.vision.host.vision import preprocess_of

        how, base, found = self.settings, self.model.model, places(self.model.model)
        unet, sampling = base.diffusion_model, self.model.get_model_object("model_sampling")
        patch = middle_patch(load_patcher(self.adapter, found).model, found, subject.tokens)
        sigmas = split(hosting.levels(self.model, how.steps), how.ratio)[1]
        both, look = torch.cat([self.positive[0][0], self.empty[0][0]]), preprocess_of(self.vision)

        def draw(*_levels: Any) -> Any:
            return torch.randn(1, 4, SIDE // 8, SIDE // 8)

        def evaluated(x: Any, sigma: Any) -> Any:
            t, options = sampling.timestep(sigma)[None].float(), {"patches": {"middle_patch": [patch]}}
            c, u = unet(x.repeat(2, 1, 1, 1), t.repeat(2), context=both, transformer_options=options).chunk(2)
            return u + how.cfg * (c - u)

        @torch.inference_mode()
        def loop() -> None:
            x = base.process_latent_in(self.vae.encode(self.image)) + sigmas[0] * draw()
            for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
                scaled = x / (sigma**2 + 1) ** 0.5
                x = DDPMSampler_step(scaled, sigma, following, evaluated(scaled, sigma), draw)
                x = x * (following**2 + 1) ** 0.5 if following else x
            made = self.vae.decode(base.process_latent_out(x))
            one, other = (self.vision.model(look(each))[0] for each in (self.image, made))
            F.cosine_similarity(one, other)

        return loop

    def counted(self, run: Callable[[], Any]) -> dict[str, int]:
        """How often run() asks each model, and how many rows of a batch that makes at the UNet."""
        counts = {"UNet": 0, "UNet, rows": 0, "encoder": 0, "decoder": 0, "vision model": 0}

        def counter(name: str) -> Callable[..., None]:
            def count(_module: Any, inputs: tuple[Any, ...]) -> None:
                counts[name] += 1
                if name == "UNet":
                    counts["UNet, rows"] += len(inputs[0])

            return count

        tiny = self.vae.first_stage_model
        modules = {
            **{"UNet": self.model.model.diffusion_model, "vision model": self.vision.model},
            **{"encoder": tiny.taesd_encoder, "decoder": tiny.taesd_decoder},
        }
        hooks = [module.register_forward_pre_hook(counter(name)) for name, module in modules.items()]
        try:
            run()
        finally:
            for hook in hooks:
                hook.remove()
        return counts


def in_session(bench: Bench, measure: Callable[[Any], None]) -> None:
    """Give measure() the training in progress, inside the node's own session."""
    from PIL import Image

    from ..core.ezigen.host import train as host

    def pixels(values: Any) -> Any:
        return Image.fromarray((values * 255).byte().numpy())

    with tempfile.TemporaryDirectory() as folder, frame.measured_training(measure):
        about = Path(folder) / "dog"
        about.mkdir()
        for name in ("one", "two"):
            pixels(bench.image[0]).save(about / f"{name}.png")
            pixels(bench.mask[0]).save(about / f"{name}.mask.png")
            (about / f"{name}.txt").write_text("a photo of a dog on the grass")
        pairs = PairFolder(Path(folder), SIDE, 1)
        host.train_adapter(host.AdapterJob(bench.model, bench.clip, bench.vae, pairs, TrainingSettings(), 100))


def bare_step(fit: Any) -> Callable[[], None]:
    """A step on the UNet and the adapter that the training holds."""
    from ..core.ezigen.host.layers import capture, middle_patch

    network, sample = fit.network, fit.sample(0)
    unet, found, parameters = network.unet, network.places, fit.adapter.published_parameters()
    adam, generator = optimizer(parameters), torch.Generator().manual_seed(0)
    plain = hosting.plain_attention()
    context, about = sample.context[None], sample.subject_contexts

    def asked(z: Any, t: Any, rows: Any, patches: dict[str, Any]) -> Any:
        return unet(z, t, context=rows, transformer_options={"patches": patches, **plain})

    def step() -> None:
        noise = torch.randn(sample.latent[None].shape, generator=generator)
        t = torch.randint(1000, (1,), generator=generator)
        kept: dict[Any, Any] = {}
        with torch.no_grad():
            asked(sample.subjects + 0.04 * noise, torch.ones(1), about, {"attn1_patch": [capture(kept)]})
        captured, share = [kept[place.key] for place in found], network.alphas_cumprod[t].view(-1, 1, 1, 1)
        tokens = batch_tokens(captured, [len(captured[0])])
        z = share.sqrt() * sample.latent[None] + (1 - share).sqrt() * noise
        patches = {"middle_patch": [middle_patch(fit.adapter, found, tokens)]}
        loss = (asked(z, t.float(), context, patches) - noise).square().mean()
        adam.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), MAX_NORM)
        adam.step()

    return step


def figures(bench: Bench) -> Iterator[tuple[str, dict[str, float]]]:
    """Counts, and times with their ratios, each as soon as it is there."""
    how, subject = bench.settings, bench.subject()
    yield "asked by a subject's encoding", dict(bench.counted(bench.subject))
    yield (
        f"asked by {how.steps} steps and {how.loops} loops",
        dict(bench.counted(lambda: bench.staged(subject, how.loops))),
    )
    step: list[dict[str, float]] = []
    in_session(bench, lambda fit: step.append(by_turns(fit.update, bare_step(fit), how.rounds)))
    yield "training step", step[0]
    yield "a loop", by_turns(lambda: bench.staged(subject, 1, bench.image), bench.bare_loop(subject), how.rounds)


def main(arguments: list[str]) -> int:
    """Print the table; exit 1 when a gate is missed."""
    options = {"--adapter": {"type": Path, "help": "in the narrow form; the committed one where none is named"}}
    run = frame.Run("cost_adapter", arguments, Settings(), options)
    found, how = run.table(figures(Bench(run.base, run.settings, run.options.adapter))), run.settings
    encoding, sampling = list(found.values())[:2]
    gates = {
        "features once per image": encoding["UNet"] == 1
        and sampling["UNet"] == how.steps + how.loops * round(how.steps * how.ratio),
        "a loop": found["a loop"]["ratio"] <= LOOP_GATE,
        "training step": found["training step"]["ratio"] <= STEP_GATE,
    }
    return run.costs(found, gates)
