"""The networks of benchmarks.peers: random, with the same weights in ComfyUI's classes and in the libraries' own."""

from __future__ import annotations

import importlib
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .cost_similarity import DECODER, DINO_WIDTH, UNET

WIDTH = 768  # of the prompt's tokens


@dataclass(frozen=True)
class Settings:
    """Width of the UNet, side of the latent, layers of DINOv2, the LoRAs' ranks, and how often each step is timed."""

    channels: int = 64
    side: int = 16
    layers: int = 2
    rank: int = 16
    siso_rank: int = 4
    rounds: int = 24


class Networks:
    """The same random weights in ComfyUI's classes, for the pack and core, and in diffusers' and transformers'."""

    def __init__(self, how: Settings) -> None:
        import comfy.sd
        import comfy.utils
        import transformers

        diffusers: Any = importlib.import_module("diffusers")
        torch.manual_seed(0)
        widths, channels = ([width * factor for factor in (1, 2, 4, 4)] for width in (how.channels, DECODER["ch"]))
        self.how, self.config = how, {**UNET, "model_channels": how.channels}
        self.unet = diffusers.UNet2DConditionModel(
            sample_size=how.side, cross_attention_dim=WIDTH, block_out_channels=widths
        ).requires_grad_(False)
        names = comfy.utils.unet_to_diffusers(dict(self.config))
        self.state = {names[name]: value for name, value in self.unet.state_dict().items()}
        self.autoencoder = diffusers.AutoencoderKL(
            block_out_channels=channels,
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            layers_per_block=2,
        ).requires_grad_(False)
        config = transformers.Dinov2Config(
            hidden_size=DINO_WIDTH, num_hidden_layers=how.layers, num_attention_heads=4, image_size=224
        )
        self.dino = transformers.Dinov2Model(config).requires_grad_(False).train(False)
        self.vision = loaded(self.dino)
        layout = {"params": {"ddconfig": DECODER, "embed_dim": 4}}
        with torch.inference_mode():
            self.vae = comfy.sd.VAE(sd=self.autoencoder.state_dict(), config=layout)
        generator = torch.Generator().manual_seed(0)
        self.context, self.empty = (torch.randn(1, 77, WIDTH, generator=generator) for _ in range(2))
        self.x0, self.target = (torch.randn(1, 4, how.side, how.side, generator=generator) for _ in range(2))
        self.images = torch.rand(1, 8 * how.side, 8 * how.side, 3, generator=generator)
        self.scheduler = diffusers.DDPMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
        )

    def model(self, inference: bool = True, **_more: Any) -> Any:
        """A MODEL of its own, which newer ComfyUI may read once more. inference: loaded as a loader node leaves it."""
        import comfy.model_base
        import comfy.model_patcher
        import comfy.supported_models

        cpu = torch.device("cpu")
        with torch.inference_mode(inference):
            config = comfy.supported_models.SD15({**self.config, "dtype": torch.float32})
            base = comfy.model_base.BaseModel(config, model_type=comfy.model_base.ModelType.EPS, device="cpu")
            base.diffusion_model.load_state_dict(self.state)
            patcher: Any = comfy.model_patcher.ModelPatcher(base, cpu, cpu)
        patcher.cached_patcher_init = (self.model, (False,))
        return patcher

    def apart(self) -> float:
        """How far a prediction of both UNets is apart, relative."""
        x, t = self.x0, torch.tensor([500])
        with torch.inference_mode():
            one = self.model().model.diffusion_model(x, t.float(), context=self.context)
            other = self.unet(x, t, self.context).sample
        return float((one - other).norm() / other.norm())


def loaded(network: Any) -> Any:
    """A network of transformers as the pack loads it."""
    from ..core.vision.host.vision import load_vision

    with tempfile.TemporaryDirectory() as folder:
        network.save_pretrained(folder)
        (Path(folder) / "preprocessor_config.json").write_text(
            json.dumps({"image_processor_type": "BitImageProcessor"})
        )
        return load_vision(Path(folder))
