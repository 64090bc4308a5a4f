"""What the two generators have in common: levels of noise, what a network's answer means, sampling, loading.

A level is a whole number from 0 (clean) to 1000 (noise alone); steps are spread as ComfyUI's scheduler "simple" does.
Both worlds mix a clean latent with noise by a table of two factors per level, and an Euler step of either goes along
the noise that the network sees: the same few lines sample both and train a student of either.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import nn

from . import assets, autoencoder, comfyui, flow_network, train_unet
from .networks import LATENT_SIDE, TextEncoder, alphas_cumprod, make_unet, token_ids
from .widen import Tensors, as_stored, part_of

LEVELS = 1000
Condition = tuple[torch.Tensor, ...]
"""What a network reads beside the latent and the time, a batch in each tensor."""


class World:
    """A generator: a network with its text encoder, its autoencoder and its levels of noise."""

    name: str
    channels: int
    guidance: float

    def __init__(self, tensors: Tensors, vocabulary: Sequence[int]) -> None:
        from transformers import CLIPTokenizer

        self.tokenizer = CLIPTokenizer.from_pretrained(str(comfyui.tokenizer_path()))
        self.network, self.text = self.make_network(), TextEncoder(list(vocabulary))
        self.encoder = autoencoder.make_encoder(self.channels)
        self.decoder = autoencoder.make_decoder(self.channels)
        parts = {"network": self.network, "text": self.text, "encoder": self.encoder, "decoder": self.decoder}
        for part, module in parts.items():
            module.load_state_dict(part_of(tensors, f"{part}."))
            module.train(False).requires_grad_(False)
        self.shift, self.scale = float(tensors["latent.shift"]), float(tensors["latent.scale"])
        self.signal, self.noise, self.times = self.tables()

    def make_network(self) -> nn.Module:
        """The network, untrained."""
        raise NotImplementedError

    def tables(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Per level: the clean latent's factor, the noise's factor, and the time that the network is told."""
        raise NotImplementedError

    def answer(self, network: nn.Module, x: torch.Tensor, level: torch.Tensor, given: Condition) -> list[torch.Tensor]:
        """(clean latent, noise) that `network` sees in x [B,C,h,w] at the levels [B]."""
        raise NotImplementedError

    def error(self, found: list[torch.Tensor], clean: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Mean squared error of what the network itself predicts, given what it sees."""
        raise NotImplementedError

    def given(self, rows: torch.Tensor) -> Condition:
        """The condition of prompts as rows of the text encoder's table [B,77]."""
        raise NotImplementedError

    def split_parameters(self, network: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """A network's parameters (for Muon, for Adam), as in its own training."""
        raise NotImplementedError

    def precision(self) -> AbstractContextManager:
        """In which precision the network's training computes."""
        return nullcontext()

    def rows(self, prompts: list[str]) -> torch.Tensor:
        """Prompts as rows of the text encoder's table."""
        return self.text.rows_of(token_ids(self.tokenizer, prompts))

    def mixed(self, clean: torch.Tensor, noise: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        """Clean latents with as much noise as the levels [B] have."""
        return self.signal[level].view(-1, 1, 1, 1) * clean + self.noise[level].view(-1, 1, 1, 1) * noise

    def noise_of(self, seeds: Sequence[int]) -> torch.Tensor:
        """The first latents of these seeds."""
        shape = (self.channels, LATENT_SIDE, LATENT_SIDE)
        return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])

    def decoded(self, latents: torch.Tensor) -> torch.Tensor:
        """Normalised latents -> pictures [B,3,96,96] in 0..1."""
        return self.decoder(latents * self.scale + self.shift).clamp(0, 1)


def levels(steps: int) -> list[int]:
    """The levels of so many steps, as the scheduler "simple" picks them, with the last one, 0."""
    return [LEVELS - int(i * LEVELS / steps) for i in range(steps)] + [0]


@torch.no_grad()
def sample(world: World, network: nn.Module, x: torch.Tensor, given: Condition, steps: int, guidance: float = 1.0,
           empty: Condition = ()) -> torch.Tensor:  # fmt: skip
    """Euler from noise x [B,C,h,w] to clean latents; a guidance other than 1 needs the empty prompt's condition."""
    path = levels(steps)
    for now, then in zip(path[:-1], path[1:], strict=True):
        if guidance == 1:
            clean, noise = world.answer(network, x, torch.full((len(x),), now), given)
        else:
            both = tuple(torch.cat([a, b.expand_as(a)]) for a, b in zip(given, empty, strict=True))
            found = world.answer(network, torch.cat([x, x]), torch.full((2 * len(x),), now), both)
            clean, noise = (without + guidance * (told - without) for told, without in map(halves, found))
        x = world.signal[then] * clean + world.noise[then] * noise
    return x


def halves(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The two halves of a batch."""
    return x.chunk(2)


class UNetWorld(World):
    """The SD1.x generator, which predicts the noise."""

    name, channels, guidance = "unet", autoencoder.CHANNELS, 4.0

    def make_network(self) -> nn.Module:
        """The narrow UNet."""
        return make_unet()

    def split_parameters(self, network: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """All matrices but those at the ends are for Muon."""
        return train_unet.split_parameters({"unet.": network})

    def tables(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """SD1.x's thousand timesteps."""
        alphas = torch.cat([torch.ones(1), alphas_cumprod()])
        return alphas.sqrt(), (1 - alphas).sqrt(), torch.arange(-1.0, LEVELS)

    def answer(self, network: nn.Module, x: torch.Tensor, level: torch.Tensor, given: Condition) -> list[torch.Tensor]:
        """The predicted noise, and what is left of x without it."""
        noise = network(x, self.times[level], context=given[0])
        return [(x - self.noise[level].view(-1, 1, 1, 1) * noise) / self.signal[level].view(-1, 1, 1, 1), noise]

    def error(self, found: list[torch.Tensor], clean: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Of the noise."""
        return (found[1] - noise).square().mean()

    def given(self, rows: torch.Tensor) -> Condition:
        """The text encoder's output."""
        return (self.text(rows),)


class FlowWorld(World):
    """The flow transformer, which predicts noise minus clean latent."""

    name, channels, guidance = "flow", autoencoder.FLOW_CHANNELS, 4.0

    def __init__(self, tensors: Tensors, vocabulary: Sequence[int]) -> None:
        super().__init__(tensors, vocabulary)
        self.standard = tensors["context.mean"].float(), tensors["context.std"].float()

    def make_network(self) -> nn.Module:
        """The narrow transformer."""
        return flow_network.make_mmdit()

    def split_parameters(self, network: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """The blocks' matrices are for Muon."""
        return flow_network.split_parameters(network)

    def precision(self) -> AbstractContextManager:
        """Products of matrices in bf16."""
        return torch.autocast("cpu", torch.bfloat16)

    def tables(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """SD3's thousand levels."""
        noise = flow_network.noise_share(torch.arange(LEVELS + 1) / LEVELS)
        return 1 - noise, noise, LEVELS * noise

    def answer(self, network: nn.Module, x: torch.Tensor, level: torch.Tensor, given: Condition) -> list[torch.Tensor]:
        """Both ends of the straight line through x."""
        flow = network(x, self.times[level], context=given[0], y=given[1])
        noise = self.noise[level].view(-1, 1, 1, 1)
        return [x - noise * flow, x + (1 - noise) * flow]

    def error(self, found: list[torch.Tensor], clean: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Of noise minus clean latent."""
        return (found[1] - found[0] - noise + clean).square().mean()

    def given(self, rows: torch.Tensor) -> Condition:
        """What CLIP-L gives an SD3 network: the last layer's output, and the normalised one at the end of the text."""
        return flow_network.condition(self.text, rows, *self.standard)


def load_unet_world(folder: Path = assets.ASSETS) -> UNetWorld:
    """The committed SD1.x generator."""
    stored = assets.read("generator", folder)
    tensors = {key.replace("unet.", "network.", 1): value for key, value in as_stored(stored).items()}
    return UNetWorld(tensors, stored["vocabulary"].tolist())


def load_flow_world(folder: Path = assets.ASSETS, tensors: Tensors | None = None) -> FlowWorld:
    """The committed flow transformer, or the one of `tensors`, with the first world's text encoder."""
    first = assets.read("generator", folder)
    text = {key: value for key, value in as_stored(first).items() if key.startswith("text.")}
    tensors = flow_network.as_stored(assets.read("flow", folder) if tensors is None else tensors)
    return FlowWorld(text | tensors, first["vocabulary"].tolist())


LOADERS = {"unet": load_unet_world, "flow": load_flow_world}
