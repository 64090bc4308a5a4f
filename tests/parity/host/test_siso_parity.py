"""SISO with ComfyUI's DINOv2 against the official functions' own numbers, on their tiny networks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from likeness.core.siso.siso import Siso, SisoSettings, similarity_loss
from likeness.core.vision.instance_retrieval import PREPROCESS, from_published

from ..siso_numbers import DINO, part, picture
from ..unets import arrays


@pytest.fixture(scope="module")
def official() -> dict[str, torch.Tensor]:
    return arrays("siso.npz")


@pytest.fixture(scope="module")
def dino(official):
    import comfy.image_encoders.dino2
    import comfy.ops

    config = {
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "layer_norm_eps": 1e-6,
        "use_swiglu_ffn": False,
    }
    model = comfy.image_encoders.dino2.Dinov2Model(config, torch.float32, "cpu", comfy.ops.manual_cast)
    missing, _ = model.load_state_dict(part(official, "dino.w."), strict=False)
    assert not missing
    return model.requires_grad_(False)


def test_dino_features_and_loss(official, dino):
    with torch.no_grad():
        subject, generated = (dino(DINO(picture(official, name)))[2] for name in ("subject", "generated"))
    torch.testing.assert_close(subject, official["dino.feat.subject"], atol=1e-5, rtol=0)
    torch.testing.assert_close(generated, official["dino.feat.generated"], atol=1e-5, rtol=0)
    assert float(similarity_loss(generated, subject)) == pytest.approx(float(official["dino.loss"]), abs=1e-5)


class Toy(torch.nn.Module):
    """The toy generator of the numbers: attention over 64 tokens, decoded to 64 x 64 pixels."""

    def __init__(self, official: dict) -> None:
        super().__init__()
        self.weights = part(official, "toy.w.")
        self.latent, self.strength = official["toy.latent"], 1.0
        self.lora = {
            name: torch.nn.Parameter(value.clone()) for name, value in sorted(part(official, "toy.lora0.").items())
        }

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        down, up = (self.lora[f"{name}.lora_{kind}.default.weight"] for kind in "AB")
        plain = F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))
        return plain + self.strength * F.linear(F.linear(x, down), up)

    def forward(self) -> torch.Tensor:
        z = self.latent
        q, k, v = (self.linear(f"to_{name}", z) for name in "qkv")
        z = z + self.linear("to_out.0", (q @ k.transpose(1, 2) / 4).softmax(-1) @ v)
        out = F.linear(z, self.weights["dec.weight"], self.weights["dec.bias"])
        out = out.view(1, 8, 8, 3, 8, 8).permute(0, 3, 1, 4, 2, 5).reshape(1, 3, 64, 64)
        return (out / 2 + 0.5).clamp(0, 1)


def terms_of(official, dino) -> list:
    ir = from_published(part(official, "ir.w."), heads=2)
    with torch.no_grad():
        seen, retrieved = dino(DINO(picture(official, "subject")))[2], ir(PREPROCESS(picture(official, "subject")))
    return [
        lambda x: similarity_loss(ir(PREPROCESS(x.movedim(1, -1))), retrieved),
        lambda x: similarity_loss(dino(DINO(x.movedim(1, -1)))[2], seen),
    ]


def test_the_first_loss_and_the_last_picture(official, dino):
    """The official snapshot of the start is the end (it was a reference), so the way between cannot be walked again."""
    toy = Toy(official)
    torch.testing.assert_close(toy().detach(), official["toy.image5"], atol=1e-5, rtol=0)
    toy.strength = 0.0
    torch.testing.assert_close(toy().detach(), official["toy.image0"], atol=1e-5, rtol=0)
    first = sum(float(term(toy().detach())) for term in terms_of(official, dino))
    assert first == pytest.approx(float(official["toy.losses"][0]), abs=1e-5)


def test_term_by_term_to_the_pixels_is_the_gradient_of_the_sum(official, dino):
    """Five iterations written out, as the official script makes them: one backward through everything."""
    terms, ours, theirs = terms_of(official, dino), Toy(official), Toy(official)
    fit = Siso(ours, terms, ours.lora, SisoSettings(float(official["toy.lr"]), 0.01))
    optimizer = torch.optim.AdamW(list(theirs.lora.values()), lr=float(official["toy.lr"]), weight_decay=0.01)
    for _ in range(5):
        fit.update()
        x = theirs()
        loss = sum(term(x) for term in terms)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.lora.values(), 1.0)
        optimizer.step()
        assert fit.losses[-1] == pytest.approx(float(loss.detach()), abs=1e-5)
    for name, value in theirs.lora.items():
        torch.testing.assert_close(ours.lora[name].detach(), value.detach(), atol=1e-4, rtol=0)
    assert len(fit.parts[0]) == 2
