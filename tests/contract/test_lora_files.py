"""The LoRA files of a likeness optimisation: stock loaders and diffusers put the same numbers on the same weights."""

from __future__ import annotations

import pytest
import torch

from .. import tiny_models
from .methods import Setting

RANK = 2
TEXTS = {"sd1": "clip_l", "sdxl": "clip_xl", "flux": "clip_flux"}


def learned(model, clip) -> dict[str, torch.Tensor]:
    """A file's tensors, with random factors."""
    from likeness.core.lora.host.layers import trained_layers
    from likeness.core.lora.low_rank import factors, new_adapters

    trained = trained_layers(model.model, None if clip is None else clip.cond_stage_model)
    adapters = new_adapters(trained.layers, RANK, 0, deviation=0.1)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for adapter in adapters.values():
            adapter.up.normal_(0, 0.1, generator=generator)
    return trained.tensors({name: value.detach() for name, value in factors(adapters).items()})


def stock(patcher) -> dict[str, torch.Tensor]:
    """What the stock loader has changed of each weight."""
    import comfy.model_management as mm

    before = {name: value.clone() for name, value in patcher.model.state_dict().items()}
    mm.load_models_gpu([patcher])
    after = {name: value - before[name] for name, value in patcher.model.state_dict().items()}
    patcher.detach()
    return {name: value for name, value in after.items() if value.any()}


def unet(family: str):
    from diffusers import UNet2DConditionModel

    xl = family == "sdxl"
    more = {"addition_embed_type": "text_time", "addition_time_embed_dim": 256} if xl else {}
    if xl:
        more["projection_class_embeddings_input_dim"] = 2816
    return UNet2DConditionModel(
        block_out_channels=(64, 128) if xl else (32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=2048 if xl else 768,
        attention_head_dim=(1, 2) if xl else 8,
        use_linear_projection=xl,
        **more,
    )


def flux():
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=64,
        pooled_projection_dim=768,
        axes_dims_rope=(4, 6, 6),
    )


def deltas(model) -> dict[str, torch.Tensor]:
    """What diffusers adds to each weight."""
    from peft.tuners.lora import LoraLayer

    found = {}
    for name, part in model.named_modules():
        if isinstance(part, LoraLayer):
            found[f"{name}.weight"] = part.get_delta_weight(next(iter(part.lora_A))).detach()
    return found


@pytest.mark.parametrize("family", ["sd1", "sdxl", "flux"])
def test_diffusers_and_the_stock_loader_change_the_same_weights(family, tmp_path, caplog):
    import comfy.sd
    import comfy.utils
    from diffusers import FluxPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
    from safetensors.torch import save_file

    setting = Setting(family)
    tensors = learned(setting.model, None)
    path = tmp_path / "lora.safetensors"
    save_file(tensors, path)
    with torch.inference_mode():
        read = comfy.utils.load_torch_file(str(path))
        patched, _ = comfy.sd.load_lora_for_models(setting.model, None, read, 1.0, 0.0)
        ours = stock(patched)
    config = setting.model.model.model_config.unet_config
    if family == "flux":
        theirs, known = flux(), comfy.utils.flux_to_diffusers(config)
        state, alphas = FluxPipeline.lora_state_dict(str(path), return_alphas=True)
        FluxPipeline.load_lora_into_transformer(state, alphas, theirs)
    else:
        theirs, known = unet(family), comfy.utils.unet_to_diffusers(config)
        pipeline = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
        state, alphas = pipeline.lora_state_dict(str(path), unet_config=theirs.config)
        pipeline.load_lora_into_unet(state, network_alphas=alphas, unet=theirs)
    found = deltas(theirs)
    assert len(found) == len({name.partition(".lora_")[0].removesuffix(".alpha") for name in tensors})
    seen = {name: torch.zeros_like(value) for name, value in ours.items()}
    for name, delta in found.items():
        place = known[name]
        ours_name, rows = (place[0], place[1]) if isinstance(place, tuple) else (place, None)
        whole = ours[f"diffusion_model.{ours_name}"]
        mine = whole if rows is None else whole.narrow(*rows)
        torch.testing.assert_close(delta.view(mine.shape), mine, atol=1e-6, rtol=1e-4)
        part = seen[f"diffusion_model.{ours_name}"]
        (part if rows is None else part.narrow(*rows)).fill_(1)
    assert all(not value[seen[name] == 0].any() for name, value in ours.items()), "the stock loader changed more"
    assert "not loaded" not in caplog.text


@pytest.mark.parametrize("family", TEXTS)
def test_diffusers_finds_every_layer_of_the_text_encoders(family, tmp_path):
    from diffusers import FluxPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
    from safetensors.torch import save_file
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    setting, clip = Setting(family), getattr(tiny_models, TEXTS[family])()
    tensors = learned(setting.model, clip)
    path = tmp_path / "lora.safetensors"
    save_file(tensors, path)
    if family == "flux":
        pipeline, (state, alphas) = FluxPipeline, FluxPipeline.lora_state_dict(str(path), return_alphas=True)
    else:
        pipeline = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
        state, alphas = pipeline.lora_state_dict(str(path), unet_config=unet(family).config)
    parts = {"text_encoder": (CLIPTextModel, "clip_l", 768, 12)}
    if family == "sdxl":
        parts["text_encoder_2"] = (CLIPTextModelWithProjection, "clip_g", 1280, 20)
    for prefix, (kind, name, width, heads) in parts.items():
        layers = getattr(clip.cond_stage_model, name).transformer.text_model.encoder.layers
        theirs = kind(
            CLIPTextConfig(
                hidden_size=width, num_hidden_layers=len(layers), intermediate_size=256, num_attention_heads=heads
            )
        )
        pipeline.load_lora_into_text_encoder(state, alphas, theirs, prefix=prefix)
        found = deltas(theirs)
        assert len(found) == 4 * len(layers) and all(delta.abs().max() > 0 for delta in found.values())


def test_a_text_encoder_that_a_checkpoint_lacks_is_left_out(monkeypatch):
    from likeness.core.lora.host.layers import trained_layers

    encoder = tiny_models.clip_xl().cond_stage_model
    monkeypatch.setattr(encoder, "clip_g", None)  # as SD3's is without that file
    names = trained_layers(Setting("sd1").model.model, encoder).names.values()
    layers = encoder.clip_l.transformer.text_model.encoder.layers
    assert len([name for name in names if name.startswith("lora_te_text_model_")]) == 4 * len(layers)
    monkeypatch.setattr(encoder, "clip_l", None)
    with pytest.raises(ValueError, match="has no CLIP part"):
        trained_layers(Setting("sd1").model.model, encoder)
