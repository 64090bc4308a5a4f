"""Other nodes of ComfyUI on the model or in the prompt: (setting, model, positive) -> (model, positive)."""

from __future__ import annotations

import torch

from .. import tiny_models
from .methods import run_node


def freeu(setting, model, positive):
    from comfy_extras.nodes_freelunch import FreeU_V2

    return run_node(FreeU_V2, model=model, b1=1.3, b2=1.4, s1=0.9, s2=0.2)[0], positive


def pag(setting, model, positive):
    from comfy_extras.nodes_pag import PerturbedAttentionGuidance

    return run_node(PerturbedAttentionGuidance, model=model, scale=3.0)[0], positive


def rescale_cfg(setting, model, positive):
    from comfy_extras.nodes_model_advanced import RescaleCFG

    return run_node(RescaleCFG, model=model, multiplier=0.7)[0], positive


def area(setting, model, positive):
    from nodes import ConditioningCombine, ConditioningSetArea

    part = run_node(ConditioningSetArea, conditioning=positive, width=32, height=64, x=0, y=0, strength=1.0)[0]
    return model, run_node(ConditioningCombine, conditioning_1=part, conditioning_2=setting.empty)[0]


def control_net(setting, model, positive):
    from nodes import ControlNetApplyAdvanced

    picture = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(9))
    applied = run_node(
        ControlNetApplyAdvanced,
        positive=positive,
        negative=setting.empty,
        control_net=tiny_models.controlnet(),
        image=picture,
        strength=1.0,
        start_percent=0.0,
        end_percent=1.0,
    )
    return model, applied[0]


def hook_lora(setting, model, positive):
    import comfy.hooks

    key = "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_q"
    shape = model.model.state_dict()[f"{key}.weight"].shape
    generator = torch.Generator().manual_seed(4)
    lora = {
        f"{key}.lora_up.weight": torch.randn(shape[0], 2, generator=generator),
        f"{key}.lora_down.weight": torch.randn(2, shape[1], generator=generator),
    }
    hooks = comfy.hooks.create_hook_lora(lora=lora, strength_model=1.0, strength_clip=0.0)
    return model, comfy.hooks.set_hooks_for_conditioning(positive, hooks)
