"""The pack beside what people would run instead: core's trainer, and plain loops over diffusers.

Both sides run by turns in one process, on one thread, timed by the process's own time. All networks are random, in
SD1.x's layout at a smaller width, with the same weights on both sides: the first line says how far their predictions
are apart. Memory of a step is the most that torch's allocator held beside weights and optimizer state, with gradients
that are left from the step before included.

Core: its node Train LoRA as it is, at its own layers (every layer, biases and norms too) and held to those of the pack.
Plain: what the papers' scripts do, without their waste: the prompt is encoded once, what is not trained has no
gradient, nothing is computed that is not used. Gradients are dropped after each step.

    python toolbox/_load.py benchmarks.peers --out benchmarks/results/peers.json
"""

from __future__ import annotations

import copy
import importlib
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from ..core.denoiser import Prompt
from ..core.embedding.hiper import HiPer, HiPerSettings
from ..core.inversion.null_text import NullText, NullTextSettings
from ..core.lora.low_rank import attached_lora, block_layers, factors, new_adapters
from ..core.sine.fine_tune import FineTune, FineTuneSettings, Samples
from ..core.siso.siso import MAX_NORM, SisoSettings
from . import frame, hosting
from .cost_similarity import peak, peak_within
from .peers_networks import Networks, Settings

NOISE = 0.03  # two runs on a busy machine differ by so much
CORE_GATE, CORE_MEMORY_GATE = 0.85 + NOISE, 1.0
PLAIN_GATE, PLAIN_MEMORY_GATE = 1.0 + NOISE, 1.1  # memory: small copies, for an update that is undone or kept
SAME = 1e-3
CFG, MANY, TOKENS = 7.5, 1 << 30, 5
RATE = 1e-9  # changes next to nothing from round to round
PROJECTIONS = ["to_q", "to_k", "to_v", "to_out.0"]
Step = Callable[[], Any]


def loop(loss: Callable[[], torch.Tensor], leaves: Iterable[Any], optimizer: Any, most: float = 0.0) -> Step:
    """A step of a plain loop, which gives its loss; most: where the gradient's norm is clipped to."""
    leaves = list(leaves)

    def step() -> torch.Tensor:
        value = loss()
        value.backward()
        if most:
            torch.nn.utils.clip_grad_norm_(leaves, most)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value.detach()

    return step


class Plain:
    """Plain loops over diffusers' classes."""

    def __init__(self, networks: Networks) -> None:
        self.n = networks
        self.x0 = networks.x0 * networks.autoencoder.config.scaling_factor

    def noise_error(self, unet: Any, context: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The squared error of a noise prediction at a random timestep."""
        noise, t = torch.randn_like(self.x0), torch.randint(0, 1000, (1,))
        noisy = self.n.scheduler.add_noise(self.x0, noise, t)
        return F.mse_loss(unet(noisy, t, context()).sample, noise)

    def hiper(self) -> Step:
        """The last tokens of the prompt are trained."""
        n = self.n
        h = n.context[:, -TOKENS:].clone().requires_grad_(True)
        return loop(
            lambda: self.noise_error(n.unet, lambda: torch.cat([n.context[:, :-TOKENS], h], 1)),
            *([h], torch.optim.Adam([h], lr=5e-3)),
        )

    def all_weights(self) -> Step:
        """SINE's fine-tuning on the whole image."""
        unet = copy.deepcopy(self.n.unet).requires_grad_(True)
        leaves = list(unet.parameters())
        return loop(lambda: self.noise_error(unet, lambda: self.n.context), leaves, torch.optim.AdamW(leaves, lr=RATE))

    def with_lora(self, rank: int) -> tuple[Any, list[Any]]:
        """A UNet with peft's LoRA on its attention, and the LoRA's weights."""
        import peft

        unet = copy.deepcopy(self.n.unet)
        unet.add_adapter(peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=PROJECTIONS))
        return unet, [value for value in unet.parameters() if value.requires_grad]

    def lora(self) -> Step:
        """The same as a LoRA."""
        unet, leaves = self.with_lora(self.n.how.rank)
        return loop(lambda: self.noise_error(unet, lambda: self.n.context), leaves, torch.optim.AdamW(leaves, lr=RATE))

    def siso(self) -> Step:
        """An image in one step, decoded, and DINOv2's similarity of it."""
        n = self.n
        unet, leaves = self.with_lora(n.how.siso_rank)
        share, scale = n.scheduler.alphas_cumprod[999], n.autoencoder.config.scaling_factor
        noise, t, side = torch.randn_like(n.x0), torch.tensor([999]), n.dino.config.image_size
        mean, std = (torch.tensor(value).view(3, 1, 1) for value in (n.vision.image_mean, n.vision.image_std))

        def seen(image: torch.Tensor) -> torch.Tensor:
            pixels = (F.interpolate(image, (side, side), mode="bicubic") - mean) / std
            return n.dino(pixel_values=pixels).last_hidden_state[:, 0]

        with torch.no_grad():
            wanted = seen(n.images.movedim(-1, 1))

        def loss() -> torch.Tensor:
            latent = (noise - (1 - share).sqrt() * unet(noise, t, n.context).sample) / share.sqrt()
            image = (n.autoencoder.decode(latent / scale).sample / 2 + 0.5).clamp(0, 1)
            return -F.cosine_similarity(seen(image), wanted).mean()

        return loop(loss, leaves, torch.optim.AdamW(leaves, lr=RATE), MAX_NORM)

    def null_text(self) -> Step:
        """An inner update of the first step's empty prompt, DDIM with 50 steps."""
        n, shares, t = self.n, self.n.scheduler.alphas_cumprod, torch.tensor([981])
        u = n.empty.clone().requires_grad_(True)
        share, following = shares[981], shares[961]
        with torch.no_grad():
            eps_c = n.unet(n.x0, t, n.context).sample

        def loss() -> torch.Tensor:
            eps_u = n.unet(n.x0, t, u).sample
            eps = eps_u + CFG * (eps_c - eps_u)
            clean = (n.x0 - (1 - share).sqrt() * eps) / share.sqrt()
            return F.mse_loss(following.sqrt() * clean + (1 - following).sqrt() * eps, n.target)

        return loop(loss, [u], torch.optim.Adam([u], lr=1e-2))


class Ours:
    """The pack's own optimizations, each inside of its session."""

    def __init__(self, networks: Networks) -> None:
        self.n, self.model = networks, networks.model()
        self.prompt, self.empty = [[networks.context, {}]], [[networks.empty, {}]]

    def run(self, body: Callable[[Any, torch.Tensor], None], **more: Any) -> None:
        from ..core.session.session import Session

        with torch.inference_mode():
            Session(self.model, self.prompt, self.n.x0, **more).run(body)

    def hiper(self, measure: Callable[[Any], None]) -> None:
        def body(denoiser: Any, x0: torch.Tensor) -> None:
            context = self.n.context.clone()
            measure(HiPer(denoiser, x0.clone(), context, context[0, -TOKENS:], HiPerSettings()))

        self.run(body, learned=TOKENS)

    def lora(self, measure: Callable[[Any], None], checkpointing: bool = False) -> None:
        def body(denoiser: Any, x0: torch.Tensor) -> None:
            layers = block_layers(denoiser.model.diffusion_model, "diffusion_model")
            adapters = new_adapters(layers, self.n.how.rank, 0)
            with attached_lora(layers, adapters):
                measure(self.fine_tune(denoiser, x0, factors(adapters)))

        self.run(body, checkpointing=checkpointing)

    def all_weights(self, measure: Callable[[Any], None]) -> None:
        self.run(lambda denoiser, x0: measure(self.fine_tune(denoiser, x0, denoiser.leaves)), all_weights=True)

    def fine_tune(self, denoiser: Any, x0: torch.Tensor, leaves: Mapping[str, Any]) -> FineTune:
        context = self.n.context.clone()
        settings = FineTuneSettings(RATE, recon_weight=0.0)  # on the whole image
        return FineTune(denoiser, Samples(x0.clone()), lambda: Prompt(context), leaves, settings)

    def siso(self, measure: Callable[[Any], None]) -> None:
        from ..core.siso.host import optimize_lora as host
        from ..core.siso.host.similarity import Similarity, similarity_part

        n = self.n
        levels = torch.tensor([float(self.model.get_model_object("model_sampling").sigma_max), 0.0])
        with frame.measured_training(measure):
            job = host.SisoJob(
                host.Generator(self.model, n.vae, self.prompt),
                Similarity((similarity_part(n.vision, 1.0, n.images),)),
                host.Sampling(torch.zeros_like(n.x0), levels, 0),
                host.SisoPlan(rank=n.how.siso_rank),
                SisoSettings(learning_rate=RATE),
            )
            host.optimize_lora(job)

    def null_text(self, measure: Callable[[Any], None]) -> None:
        sigmas = hosting.levels(self.model, 50)
        path = torch.stack([self.n.x0, *[self.n.target] * 50]) * (1 + sigmas**2).sqrt().view(-1, 1, 1, 1, 1)

        def body(denoiser: Any, _x0: torch.Tensor) -> None:
            context, null = self.n.context.clone(), self.n.empty.clone()
            settings = NullTextSettings(CFG, MANY, epsilon=0.0)
            measure(NullText(denoiser, path, sigmas, context, null, settings, denoiser.of("negative")))

        self.run(body, negative=self.empty)


def memory(step: Step, optimizer: Any = None) -> int:
    """The most bytes beside weights and optimizer: of two steps, as gradients may be left over from one to the next."""
    if optimizer is not None:
        optimizer.zero_grad(set_to_none=True)
    return peak(lambda: (step(), step()))


def row(times: dict[str, float], ours: int, theirs: int) -> dict[str, float]:
    """A line of the table."""
    more = {"memory": ours, "their memory": theirs, "memory ratio": ours / theirs}
    return {"ours": times["ours"], "theirs": times["bare"], "ratio": times["ratio"], **more}


def beside_plain(ours: Callable[..., None], theirs: Step, rounds: int) -> dict[str, float]:
    """A step of ours beside one of theirs."""
    found: list[dict[str, float]] = []

    def measure(fit: Any) -> None:
        times = frame.by_turns(fit.update, theirs, rounds, time.process_time)
        found.append(row(times, memory(fit.update, fit.optimizer), memory(theirs)))

    ours(measure)
    return found[0]


class Turns:
    """Stands in for the progress bar around the loop of core's node: makes a step of ours between two of core's, and
    measures both.
    """

    def __init__(self, ours: Step, rounds: int) -> None:
        self.ours, self.rounds, self.peak = ours, rounds, 0
        self.times: dict[str, list[float]] = {"ours": [], "bare": []}

    def __call__(self, *_range: Any, **_how: Any) -> Turns:
        return self

    def set_postfix(self, *_shown: Any) -> None:
        """Core shows its loss here."""

    def __iter__(self) -> Iterator[int]:
        for turn in range(self.rounds + 2):
            if turn % 2:
                self.mine()
            began = time.process_time()
            yield turn
            self.times["bare"].append(time.process_time() - began)
            if not turn % 2:
                self.mine()
        with peak_within() as held:
            yield self.rounds + 2
            yield self.rounds + 3
        self.peak = held()

    def mine(self) -> None:
        began = time.process_time()
        self.ours()
        self.times["ours"].append(time.process_time() - began)

    def medians(self) -> dict[str, float]:
        """As frame.by_turns() gives them."""
        medians = {name: statistics.median(values[2:]) for name, values in self.times.items()}
        return {**medians, "ratio": medians["ours"] / medians["bare"]}


def held_to(model: Any, keys: Iterable[str]) -> Any:
    """A clone on which core's node can wrap only these weights."""
    clone, kept = model.clone(), set(keys)

    def add(key: str, wrapper: Any) -> None:
        if key in kept:
            type(clone).add_weight_wrapper(clone, key, wrapper)

    clone.add_weight_wrapper, clone.clone = add, lambda **_how: clone
    return clone


def beside_core(networks: Networks, ours: Ours, equal: bool, checkpointing: bool) -> dict[str, float]:
    """A step of our LoRA beside one of core's Train LoRA."""
    core: Any = importlib.import_module("comfy_extras.nodes_train")
    how, model = networks.how, networks.model(inference=not equal)
    if equal:
        layers = block_layers(model.model.diffusion_model, "diffusion_model")
        model = held_to(model, [f"{name}.weight" for name in layers])
    latents = [{"samples": networks.x0.clone()}] * 2  # the node takes no single one
    found: list[dict[str, float]] = []

    def measure(fit: Any) -> None:
        turns = Turns(fit.update, how.rounds)
        trange, core.trange = core.trange, turns
        try:
            values = {
                **{"model": model, "positive": [[networks.context.clone(), {}]], "batch_size": 1, "rank": how.rank},
                **{"steps": how.rounds + 4, "grad_accumulation_steps": 1, "learning_rate": RATE, "seed": 0},
                **{"optimizer": "AdamW", "loss_function": "MSE", "training_dtype": "fp32", "lora_dtype": "fp32"},
                **{"algorithm": "LoRA", "gradient_checkpointing": checkpointing, "existing_lora": "[None]"},
            }
            others = {each.id: getattr(each, "default", None) for each in core.TrainLoraNode.define_schema().inputs}
            given = {**{name: value for name, value in others.items() if value is not None}, **values}
            with torch.inference_mode():  # newer ComfyUI's node takes more
                core.TrainLoraNode.execute(latents=latents, **{name: [value] for name, value in given.items()})
        finally:
            core.trange = trange
        found.append(row(turns.medians(), memory(fit.update, fit.optimizer), turns.peak))

    ours.lora(measure, checkpointing)
    return found[0]


def figures(how: Settings) -> Iterator[tuple[str, dict[str, float]]]:
    """All of them."""
    networks = Networks(how)
    yield "the same network", {"apart": networks.apart()}
    ours, plain = Ours(networks), Plain(networks)
    for name, equal in (("its own layers", False), ("equal layers", True)):
        for more, checkpointing in (("", False), (", checkpointing", True)):
            yield f"core's Train LoRA, {name}{more}", beside_core(networks, ours, equal, checkpointing)
    for name, mine, theirs in (
        ("HiPer's update", ours.hiper, plain.hiper),
        ("SINE's fine-tuning, all weights", ours.all_weights, plain.all_weights),
        ("SINE's fine-tuning, LoRA", ours.lora, plain.lora),
        ("SISO's iteration with DINOv2", ours.siso, plain.siso),
        ("null-text's update", ours.null_text, plain.null_text),
    ):
        yield f"plain loop, {name}", beside_plain(mine, theirs(), how.rounds)


def gates(found: dict[str, Any]) -> dict[str, bool]:
    """What is wanted; core's own layers are more work."""
    held = {"the same network": found["the same network"]["apart"] <= SAME}
    for name, values in found.items():
        if "ratio" in values:
            core = name.startswith("core")
            held[f"{name}: time"] = values["ratio"] <= (CORE_GATE if core else PLAIN_GATE)
            held[f"{name}: memory"] = values["memory ratio"] <= (CORE_MEMORY_GATE if core else PLAIN_MEMORY_GATE)
    return held


def main(arguments: list[str]) -> int:
    """Print the table; exit 1 when a gate is missed."""
    run = frame.Run("peers", arguments, Settings(), threads=1)
    found = run.table(figures(run.settings))
    return run.costs({**found, "settings": vars(run.settings)}, gates(found))
