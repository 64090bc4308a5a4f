"""What EZIGen's adapter costs beside the bare modules: the loops of the staged sampler, and a step of training.

A bare loop: the same evaluations of the same UNet with the adapter in it (two prompts in one batch), the DDPM update,
one way through the autoencoder and one comparison of two pictures by the vision model, without ComfyUI's sampler and
guider. A bare step: the UNet on the subject's picture without a gradient, the UNet with the adapter on the noisy one,
backward, clipping and AdamW, without sessions, draws and folders; both run inside the node's own session. By turns in
one process; the ratio of the medians counts, not the seconds. The small world in its wide form, at 96 px.

Counted: how often the UNet, the autoencoder and the vision model are asked. A subject's features are made once, by one
evaluation for each of its pictures, and every sampling after that asks the UNet only for its own steps.

    python toolbox/_load.py benchmarks.cost_adapter --out benchmarks/results/cost_adapter.json
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from . import hosting
from .cost import ROUNDS, by_turns

STEPS, RATIO, CFG, LOOPS, SIDE = 20, 0.4, 4.0, 2, 96
LOOP_GATE, STEP_GATE = 1.05, 1.15


class Bench:
    """The small world with its adapter, a subject, a prompt and a vision model."""

    def __init__(self, base: Path, adapter: Path | None) -> None:
        import torch

        from ..core.ezigen.artifact import StoredAdapter, read_adapter
        from ..core.ezigen.host.adapter import prepared
        from ..core.vision.host.vision import load_vision
        from ..toyworld import assets, widen, world
        from ..toyworld.vision_models import build_vision_folders

        self.model, self.clip, self.vae = hosting.small_world(base)
        narrow = assets.read("adapter") if adapter is None else read_adapter(adapter).tensors
        wide = {name: value.float() for name, value in widen.widen_adapter(narrow).items()}
        self.adapter = StoredAdapter(wide, {})
        self.vision = load_vision(build_vision_folders(base / "models" / "likeness_vision")["small_world_dino"])
        with torch.inference_mode():
            self.about, self.positive, self.empty = (
                self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text))
                for text in ("a photo of a dog", "a photo of a dog in the snow", "")
            )
        pixels, mask = world.render(world.identity(1, "dog"), "grass", 1)
        self.picture, self.mask = (torch.from_numpy(each)[None].float() / 255 for each in (pixels, mask))
        self.cut_out = prepared(self.picture, self.mask, SIDE, 0.06)

    def subject(self) -> Any:
        """The subject, encoded."""
        import torch

        from ..core.ezigen.host.adapter import encode_subject

        with torch.inference_mode():
            return encode_subject(self.model, self.vae, self.about, self.cut_out, 0)

    def staged(self, subject: Any, loops: int, start: Any = None) -> None:
        """The pack's own staged sampling, or its loops alone where a picture is there to start from."""
        import torch

        from ..core.ezigen.host.staged import Prompts, StagedSettings, staged
        from ..core.ezigen.staged import Loops

        prompts = Prompts(self.positive, self.empty, self.empty)
        settings = StagedSettings(0, STEPS, CFG, RATIO, Loops(loops, loops))
        with torch.inference_mode():
            latent = torch.zeros(1, 4, SIDE // 8, SIDE // 8)
            staged(self.model, self.vae, self.adapter, subject, prompts, latent, settings, self.vision, start)

    def bare_loop(self, subject: Any) -> Callable[[], None]:
        """A loop on the modules themselves."""
        import comfy.samplers
        import torch
        import torch.nn.functional as F
        from comfy.k_diffusion.sampling import DDPMSampler_step

        from ..core.ezigen.host.adapter import loaded
        from ..core.ezigen.host.layers import middle_patch, places
        from ..core.ezigen.staged import split
        from ..core.vision.host.vision import preprocess_of

        base, found = self.model.model, places(self.model.model)
        unet, sampling = base.diffusion_model, self.model.get_model_object("model_sampling")
        patch = middle_patch(loaded(self.adapter, found).model, found, subject.tokens)
        sigmas = split(comfy.samplers.calculate_sigmas(sampling, "ddim_uniform", STEPS), RATIO)[1]
        both, look = torch.cat([self.positive[0][0], self.empty[0][0]]), preprocess_of(self.vision)

        def draw(*_levels: Any) -> Any:
            return torch.randn(1, 4, SIDE // 8, SIDE // 8)

        def evaluated(x: Any, sigma: Any) -> Any:
            t, options = sampling.timestep(sigma)[None].float(), {"patches": {"middle_patch": [patch]}}
            c, u = unet(x.repeat(2, 1, 1, 1), t.repeat(2), context=both, transformer_options=options).chunk(2)
            return u + CFG * (c - u)

        def loop(picture: Any) -> None:
            x = base.process_latent_in(self.vae.encode(picture)) + sigmas[0] * draw()
            for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
                scaled = x / (sigma**2 + 1) ** 0.5
                x = DDPMSampler_step(scaled, sigma, following, evaluated(scaled, sigma), draw)
                x = x * (following**2 + 1) ** 0.5 if following else x
            made = self.vae.decode(base.process_latent_out(x))
            one, other = (self.vision.model(look(each)).embedding for each in (picture, made))
            F.cosine_similarity(one, other)

        def run() -> None:
            with torch.inference_mode():
                loop(self.picture)

        return run

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
    import torch
    from PIL import Image

    from ..core.ezigen.host import train as host
    from ..core.ezigen.subject_pairs import PairFolder
    from ..core.ezigen.train import TrainingSettings

    class Measured(Exception):
        pass

    def train(fit: Any, *_args: Any, **_more: Any) -> None:
        measure(fit)
        raise Measured

    def pixels(values: Any) -> Any:
        return Image.fromarray((values * 255).byte().numpy())

    with tempfile.TemporaryDirectory() as folder:
        about = Path(folder) / "dog"
        about.mkdir()
        for name in ("one", "two"):
            pixels(bench.picture[0]).save(about / f"{name}.png")
            pixels(bench.mask[0]).save(about / f"{name}.mask.png")
            (about / f"{name}.txt").write_text("a photo of a dog on the grass")
        before, host.train = host.train, train  # ty: ignore[invalid-assignment]
        try:
            with torch.inference_mode():
                trainee, plan = host.Trainee(bench.model, bench.clip, bench.vae), host.Plan(SIDE, 100, 1)
                host.train_adapter(trainee, PairFolder(Path(folder), SIDE, 1), plan, TrainingSettings())
        except Measured:
            pass
        finally:
            host.train = before


def bare_step(fit: Any) -> Callable[[], None]:
    """A step on the UNet and the adapter that the training holds."""
    import torch
    from comfy.ldm.modules.attention import attention_pytorch

    from ..core.ezigen.adapter import joined
    from ..core.ezigen.host.layers import Capture, middle_patch
    from ..core.ezigen.train import MAX_NORM, optimizer

    network, sample = fit.network, fit.sample(0)
    unet, found, parameters = network.unet, network.places, fit.adapter.named()
    adam, generator = optimizer(parameters), torch.Generator().manual_seed(0)
    context, about = sample.context[None], sample.subject_contexts

    def asked(z: Any, t: Any, rows: Any, patches: dict[str, Any]) -> Any:
        override = {"optimized_attention_override": lambda _chosen, *a, **k: attention_pytorch(*a, **k)}
        options = {"patches": patches, **override}
        return unet(z, t, context=rows, transformer_options=options)

    def step() -> None:
        noise = torch.randn(sample.latent[None].shape, generator=generator)
        t = torch.randint(1000, (1,), generator=generator)
        kept = Capture()
        with torch.no_grad():
            asked(sample.subjects + 0.04 * noise, torch.ones(1), about, {"attn1_patch": [kept]})
        tokens, share = joined(kept.order(found)), network.alphas_cumprod[t].view(-1, 1, 1, 1)
        z = share.sqrt() * sample.latent[None] + (1 - share).sqrt() * noise
        patches = {"middle_patch": [middle_patch(fit.adapter, found, tokens)]}
        loss = (asked(z, t.float(), context, patches) - noise).square().mean()
        adam.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), MAX_NORM)
        adam.step()

    return step


def figures(bench: Bench, rounds: int) -> Iterator[tuple[str, dict[str, float]]]:
    """Counts, and times with their ratios, each as soon as it is there."""
    subject = bench.subject()
    yield "asked by a subject's encoding", dict(bench.counted(bench.subject))
    yield f"asked by {STEPS} steps and {LOOPS} loops", dict(bench.counted(lambda: bench.staged(subject, LOOPS)))
    step: list[dict[str, float]] = []
    in_session(bench, lambda fit: step.append(by_turns(fit.update, bare_step(fit), rounds)))
    yield "training step", step[0]
    yield "a loop", by_turns(lambda: bench.staged(subject, 1, bench.picture), bench.bare_loop(subject), rounds)


def main(arguments: list[str]) -> int:
    """Print the table; exit 1 when a gate is missed."""
    parser = argparse.ArgumentParser(prog="benchmarks.cost_adapter")
    parser.add_argument("--adapter", type=Path, help="in the narrow form; the committed one where none is named")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    base = hosting.start(options.threads)
    import torch

    found = {}
    for name, values in figures(Bench(base, options.adapter), options.rounds):
        found[name] = values
        sys.stdout.write(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in values.items()) + "\n")
        sys.stdout.flush()
    if options.out:
        content = {**found, "torch": torch.__version__, "threads": options.threads}
        options.out.write_text(json.dumps(content, indent=1) + "\n")
    encoding, sampling = (found[name] for name in list(found)[:2])
    evaluations = STEPS + LOOPS * round(STEPS * RATIO)
    gates = {
        "features once per picture": encoding["UNet"] == 1 and sampling["UNet"] == evaluations,
        "a loop": found["a loop"]["ratio"] <= LOOP_GATE,
        "training step": found["training step"]["ratio"] <= STEP_GATE,
    }
    missed = [name for name, held in gates.items() if not held]
    sys.stdout.write(f"missed gates: {', '.join(missed) or 'none'}\n")
    return int(bool(missed))
