"""The report on a model file, from its header alone."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from .. import look_at_model, tiny_families, tiny_models

FLUX = {
    **{"image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": 768, "context_in_dim": 4096},
    **{"hidden_size": 3072, "mlp_ratio": 4.0, "num_heads": 24, "depth": 19, "depth_single_blocks": 38},
    **{"axes_dim": [16, 56, 56], "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": True},
    **tiny_families.if_known("comfy.ldm.flux.model", "FluxParams", txt_ids_dims=[]),
}
QWEN = {
    **{"image_model": "qwen_image", "patch_size": 2, "in_channels": 64, "out_channels": 16, "num_layers": 60},
    **{"attention_head_dim": 128, "num_attention_heads": 24, "joint_attention_dim": 3584},
    **{"axes_dims_rope": (16, 56, 56)},
}
SD15 = tiny_models.unet_config(
    *(320, 768),
    **{"num_res_blocks": [2] * 4, "channel_mult": [1, 2, 4, 4], "num_heads": 8, "transformer_depth": [1] * 6 + [0] * 2},
    transformer_depth_output=[1] * 9 + [0] * 3,
)
CASES = {
    "flux": ("Flux", "Flux", FLUX, ("as Flux", "4 axes", "a flow model", "place of padding", "stock loaders read 304")),
    "qwen": ("QwenImage", "QwenImage", QWEN, ("as QwenImage", "5 axes", "a flow model", "appended", "again 60 blocks")),
    "sd1": (
        "BaseModel",
        "SD15",
        SD15,
        ("as SD15", "4 axes", "adds noise", "place of padding", "stock loaders read 128"),
    ),
}


def full_size(base: str, config: str, unet: dict) -> dict[str, torch.Tensor]:
    """The tensors of a model's network in its true size, without numbers."""
    import comfy.model_base
    import comfy.supported_models

    settings = getattr(comfy.supported_models, config)({**unet, "dtype": torch.bfloat16})
    return getattr(comfy.model_base, base)(settings, device="meta").diffusion_model.state_dict()


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("name", CASES)
def test_what_a_file_holds_is_told(monkeypatch, tmp_path, name, prefix):
    base, config, unet, said = CASES[name]
    tensors = {prefix + key: value for key, value in full_size(base, config, unet).items()}
    monkeypatch.setattr(look_at_model, "shapes", lambda _path: tensors)
    text = "\n".join(look_at_model.report(tmp_path / "model.safetensors"))
    assert all(part in text for part in said), text
    assert ("cannot be told where in an image it is" in text) == (name == "qwen")


def test_an_unknown_model_is_told_from_its_header(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"a.weight": torch.ones(2, 3)}, file)
    assert {name: value.shape for name, value in look_at_model.shapes(file).items()} == {"a.weight": (2, 3)}
    assert "does not know the model of model.safetensors" in next(look_at_model.report(file))
