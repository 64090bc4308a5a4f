"""LPIPS from the user's weight files: the linear heads, and the AlexNet or VGG16 they were trained on.

The networks are torchvision's. Heads: the LPIPS authors' files (alex.pth, vgg.pth), or the state dict of their whole
model. Backbone: torchvision's file, recognised by its name (alexnet*.pth, vgg16*.pth) in models/likeness_lpips, or
contained in the heads file. Either may be a safetensors file.
"""

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from ....files import read_weights
from ... import measures
from .offline import reason

SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # for images in -1..1, from the reference code
SMALLEST = 32  # px; below it the output of the last pooling is empty
HEAD = r"lins?\.?(\d)\.model\.1\.weight"
LAYER = r"(?:net\.slice\d+|features)\.(\d+\.(?:weight|bias))"
MAX_BYTES = 2 << 30  # VGG16 with its classifier is 0.5 GB
SUFFIXES = (".pth", ".pt", ".safetensors")

# Widths of the five compared layers -> (name, torchvision's network name, indices of the compared ReLUs).
Backbone = tuple[str, str, tuple[int, ...]]
BACKBONES: dict[tuple[int, ...], Backbone] = {
    (64, 192, 384, 256, 256): ("AlexNet", "alexnet", (1, 4, 7, 9, 11)),
    (64, 128, 256, 512, 512): ("VGG16", "vgg16", (3, 8, 15, 22, 29)),
}


class Lpips(nn.Module):
    """Feature maps of one backbone and the distance between them (vision/measures.py)."""

    def __init__(self, backbone: str, compared: tuple[int, ...], heads: list[Tensor]) -> None:
        super().__init__()
        import torchvision  # comes with ComfyUI

        features = getattr(torchvision.models, backbone)(weights=None).features[: compared[-1] + 1]
        for layer in features:
            if isinstance(layer, nn.ReLU):
                layer.inplace = False  # the feature map before it is still needed for its gradient
        self.layers, self.compared = features, compared
        for i, head in enumerate(heads):
            self.register_buffer(f"head{i}", head)
        self.description = ""

    def features(self, pixels: Tensor) -> list[Tensor]:
        """The compared feature maps of images [B, H, W, 3] in 0..1."""
        x = pixels[..., :3].movedim(-1, 1).float() * 2.0 - 1.0
        x = (x - torch.tensor(SHIFT).to(x).view(3, 1, 1)) / torch.tensor(SCALE).to(x).view(3, 1, 1)
        maps = []
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i in self.compared:
                maps.append(x)
        return maps

    def forward(self, a: Tensor, b: Tensor, weight: Tensor | None = None) -> Tensor:
        """LPIPS for each pair of images -> [B]; weight as in vision/measures.py."""
        heads = [getattr(self, f"head{i}") for i in range(len(self.compared))]
        return measures.lpips(self.features(a), self.features(b), heads, weight)


def load_lpips(path: Path, folders: Iterable[str]) -> Lpips:
    """Load the heads from `path`, and the backbone from the same file or the first matching file in `folders`."""
    tensors = read_weights(path, MAX_BYTES)
    by_layer = {int(match[1]): value for name, value in tensors.items() if (match := re.fullmatch(HEAD, name))}
    heads = [by_layer[i].flatten().float() for i in sorted(by_layer)]
    widths = tuple(head.numel() for head in heads)
    if widths not in BACKBONES:
        raise ValueError(
            f"{path.name} holds LPIPS heads of widths {widths}, expected AlexNet's (64, 192, 384, 256, 256) or "
            "VGG16's (64, 128, 256, 512, 512): choose the authors' alex.pth or vgg.pth."
        )
    name, network, compared = BACKBONES[widths]
    source, state = path, _backbone(tensors)
    if not state:
        files = (file for folder in folders for file in sorted(Path(folder).glob("*")))
        matches = [f for f in files if f.name.lower().startswith(network) and f.suffix.lower() in SUFFIXES]
        if not matches:
            raise ValueError(
                f"{path.name} needs the weights of {name}, which are not there: put torchvision's {network}*.pth "
                "into models/likeness_lpips."
            )
        source, state = matches[0], _backbone(read_weights(matches[0], MAX_BYTES))
    with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices=[]):
        model = Lpips(network, compared, heads)
        try:
            model.layers.load_state_dict({key: state[key].float() for key in model.layers.state_dict()})
        except (KeyError, RuntimeError) as error:
            raise ValueError(
                f"{source.name} does not hold the convolutions of {name} ({reason(error)}): use torchvision's "
                f"{network} file."
            ) from error
    model.description = f"LPIPS {name} (heads {path.name}, backbone {source.name})"
    return model.train(False).requires_grad_(False)


def _backbone(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {match[1]: value for name, value in tensors.items() if (match := re.fullmatch(LAYER, name))}
