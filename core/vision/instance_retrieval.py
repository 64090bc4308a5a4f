"""Instance-retrieval features (Shao and Cui 2022, arXiv 2210.08473): a ViT-H/14 with overlapping patches, and a linear
layer to 64 features that distinguish individual objects of the same kind.

First place in the Google Universal Image Embedding challenge: a CLIP vision tower fine-tuned on images of products and
landmarks. SISO (arXiv 2503.16025) uses it as its second feature. The network is CLIP's, except for a stride of 12
pixels instead of 14, so that an image of 290 pixels gives 24 x 24 patches.

The published weights are a .pth with two parts, the tower ("backbone.") and the layer ("fc1."); a third, the classifier
used in training ("fc2."), is not needed.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .preprocess import CLIP_MEAN, CLIP_STD, Preprocess

SIDE, PATCH, STRIDE, HEAD_WIDTH = 290, 14, 12, 80
PREPROCESS = Preprocess(SIDE, SIDE, CLIP_MEAN, CLIP_STD, published=True)
PREFIX, UNUSED, BLOCKS = "module.", "fc2.", "backbone.transformer.resblocks."


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)); parameter names as in the published file."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        hidden = {"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)}
        self.mlp = nn.ModuleDict(hidden)

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x))))


class Backbone(nn.Module):
    """Images [B, 3, 290, 290] -> [B, out]: the projected class token."""

    def __init__(self, width: int, layers: int, heads: int, out: int, tokens: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, PATCH, STRIDE, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty(tokens, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(Block(width, heads) for _ in range(layers))})
        self.proj = nn.Parameter(torch.empty(width, out))

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv1(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        x = self.ln_pre(x)
        for block in self.transformer["resblocks"]:  # ty: ignore[not-iterable]
            x = block(x)
        return self.ln_post(x[:, 0]) @ self.proj


class RetrievalNetwork(nn.Module):
    """Images [B, 3, 290, 290] from PREPROCESS -> features [B, 64]."""

    __qualname__ = "InstanceRetrieval"  # its name in the keys of stored runs

    def __init__(self, backbone: Backbone, features: int) -> None:
        super().__init__()
        self.backbone, self.fc1 = backbone, nn.Linear(backbone.proj.shape[1], features)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc1(self.backbone(images))


def from_published(tensors: Mapping[str, Tensor], heads: int | None = None) -> RetrievalNetwork:
    """The network of a published file, frozen; ValueError when these are not its weights.

    heads: number of attention heads, which the weights do not determine; by default each is 80 wide as in ViT-H.
    """
    state = {name.removeprefix(PREFIX): value for name, value in tensors.items()}
    state = {name: value for name, value in state.items() if not name.startswith(UNUSED)}
    try:
        width, _, *patch = state["backbone.conv1.weight"].shape
        tokens, out = state["backbone.positional_embedding"].shape[0], state["backbone.proj"].shape[1]
        features = state["fc1.weight"].shape[0]
    except (KeyError, IndexError, ValueError) as error:
        raise _other_weights(f"{error} is missing or has another shape") from error
    blocks = {name.removeprefix(BLOCKS).split(".")[0] for name in state if name.startswith(BLOCKS)}
    layers = len(blocks)  # the number of blocks in the file, so that a large index in a name cannot make it larger
    if not blocks or blocks != {str(index) for index in range(layers)}:
        raise _other_weights(
            f"{BLOCKS}* are numbered {', '.join(sorted(blocks)[:5]) or 'nothing'}, expected 0, 1, 2 ..."
        )
    expected = ((SIDE - PATCH) // STRIDE + 1) ** 2 + 1
    if tokens != expected or patch != [PATCH, PATCH]:
        raise ValueError(
            f"The model looks at {tokens} tokens of patches {patch}, expected {expected} of {PATCH} x {PATCH}: this is "
            "another vision model; load it with Load Vision Model."
        )
    model = RetrievalNetwork(Backbone(width, layers, heads or max(1, width // HEAD_WIDTH), out, tokens), features)
    try:
        model.load_state_dict({name: value.float() for name, value in state.items()})
    except RuntimeError as error:  # lists each missing, unexpected or misshapen tensor
        raise _other_weights(" ".join(str(error).split())[:300]) from error
    return model.train(False).requires_grad_(False)


def _other_weights(why: str) -> ValueError:
    return ValueError(
        f"These are not the weights of the instance-retrieval model ({why}): choose the published file of the "
        "universal image embedding challenge."
    )
