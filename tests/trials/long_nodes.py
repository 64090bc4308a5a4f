"""Each node that works for long, in a small graph on random models, and the patches of other nodes on its MODEL."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from likeness.core.fit.runs import digest

from .. import tiny_models
from ..contract.methods import _similarity_model
from ..contract.setting import Setting, autoencoder, levels, run_node
from ..contract.test_adapter import stored, subject

TARGET = "target"  # the node of the graph that is tried
LAYER = "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_q"
LORA, PICTURES = "trial.safetensors", "trial_subjects"


@dataclass(frozen=True)
class Case:
    """A node with the inputs that differ from its defaults; "@name" is one of THINGS, @trajectory an inversion's."""

    node: str
    inputs: dict[str, Any] = field(default_factory=dict)
    updates: int = 0
    """Of a training: so many, stored and resumed."""
    sampled: bool = False
    """Its MODEL is sampled with; the interrupt may come during that."""


INVERTED = {"latent": "@latent", "label": "published"}
LIKE = {"iterations": 4, "rank": 2, "patience": 0, "learning_rate": 0.003, "sigmas": "@one_level", "latent": "@blank"}
LOOPS = {"steps": 5, "min_loops": 1, "max_loops": 1}
TUNE = {"steps": 4, "rank": 4, "resolution": 64, "crops": 3, "positive": "@positive", "learning_rate": 0.002}
CASES = {
    "hiper": Case("LikenessTrainEmbedding", {"steps": 4, "preview_steps": 3, "latent": "@latent"}, 4),
    "anchored": Case(
        "LikenessTrainEmbedding",
        {"steps": 4, "preview_steps": 0, "latent": "@latent", "negative": "@negative", "anchor_weight": 0.05},
        4,
    ),
    "step-wise": Case("LikenessRefineEmbedding", {"latent": "@latent", "inner_steps": 2}, 8),
    "fine-tune": Case("LikenessFineTune", TUNE, 4),
    "full weights": Case("LikenessFineTune", {**TUNE, "method": "full weights", "learning_rate": 1e-4}, 4),
    "likeness": Case("LikenessOptimizeLora", {**LIKE, "negative": "@negative"}, 4),
    "adapter": Case("LikenessTrainAdapter", {"folder": PICTURES, "size": 64, "steps": 4, "max_subjects": 1}, 4),
    "null-text": Case("LikenessNullText", {"inner_steps": 2, "epsilon": 0.0}, 8),
    "reference": Case("LikenessReferenceGuide", {"inner_steps": 2, "start_percent": 0.3}, 4),
    "inversion": Case("LikenessInvert", INVERTED),
    "renoise": Case("LikenessRenoise", {"latent": "@latent", "iterations": 2, "averaged": 1}),
    "staged": Case("LikenessStagedSampler", {**LOOPS, "latent": "@blank"}),
    "staged edit": Case("LikenessStagedEdit", {**LOOPS, "image": "@image"}),
    "replace": Case("LikenessReplaceSubject", {"latent": "@latent", "mask": "@mask", "blend": 0.3}, sampled=True),
    "guidance": Case("LikenessGuidance", {}, sampled=True),
    "adapted": Case("LikenessApplyAdapter", {}, sampled=True),
    "encode": Case("LikenessEncodeSubject", {"size": 64, "mask": "@mask"}),
    "inspect": Case("LikenessInspect", {"latent": "@latent"}),
}
PATCHES: dict[str, tuple[str, dict[str, Any]] | None] = {
    "alone": None,
    "ToMe": ("TomePatchModel", {"ratio": 0.3}),
    "SAG": ("SelfAttentionGuidance", {"scale": 0.5, "blur_sigma": 2.0}),
    "PAG": ("PerturbedAttentionGuidance", {"scale": 3.0}),
    "EasyCache": (
        "EasyCache",
        {"reuse_threshold": 0.2, "start_percent": 0.0, "end_percent": 1.0, "verbose": False},
    ),
    "LoRA": ("LoraLoaderModelOnly", {"lora_name": LORA, "strength_model": 0.5}),
}


TYPES = {
    "model": "MODEL", "clip": "CLIP", "vae": "VAE", "positive": "CONDITIONING", "conditioning": "CONDITIONING",
    "tuned_positive": "CONDITIONING", "negative": "CONDITIONING", "latent": "LATENT", "image": "IMAGE",
    "blank": "LATENT", "sigmas": "SIGMAS", "one_level": "SIGMAS", "mask": "MASK", "noise": "NOISE",
    "adapter": "LIKENESS_ADAPTER", "subject": "LIKENESS_SUBJECT", "embedding": "LIKENESS_EMBEDDING",
    "similarity": "LIKENESS_SIMILARITY", "tuned": "MODEL", "sampler": "SAMPLER",
}  # fmt: skip


class Things:
    """What the nodes are connected to, by the names of TYPES."""

    def __init__(self) -> None:
        import comfy.samplers
        from comfy_extras.nodes_custom_sampler import Noise_RandomNoise

        from likeness.core.embedding.artifact import Embedding
        from likeness.core.session.fingerprint import fingerprint
        from likeness.nodes.similarity import LikenessSimilarity

        setting = Setting()
        self.model, self.clip, self.vae = setting.model, tiny_models.clip_l(), autoencoder()
        self.positive = self.conditioning = self.tuned_positive = setting.source
        self.negative, self.latent, self.image = setting.empty, setting.latent, setting.image
        self.blank = {"samples": torch.zeros_like(setting.latent["samples"])}
        self.sigmas, self.one_level = levels(setting, 4, of=4), levels(setting, 1)
        self.mask = torch.zeros(1, 64, 64)
        self.mask[:, 16:48, 16:48] = 1
        self.noise, self.adapter, self.subject = Noise_RandomNoise(3), stored(setting.model), subject(setting)
        self.sampler = comfy.samplers.sampler_object("euler")
        self.embedding = Embedding({6: setting.source[0][0][:, -5:].clone()}, {"base": fingerprint(setting.model)})
        alike = {"vision": _similarity_model(), "image": setting.image, "weight": 1.0}
        self.similarity = run_node(LikenessSimilarity, **alike)[0]
        self.tuned = setting.model.clone()
        shape = setting.model.model.state_dict()[f"{LAYER}.weight"].shape
        self.tuned.add_patches({f"{LAYER}.weight": ("diff", (torch.full(shape, 0.01),))}, 1.0)

    def weights(self) -> str:
        """A digest of all models, as they were loaded; what ComfyUI has patched into them is taken out."""
        import comfy.model_management as mm

        mm.unload_all_models()
        modules = (self.model.model, self.clip.patcher.model, self.vae.first_stage_model)
        for module in modules:
            assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
            left = [name for name, value in module.named_parameters() if value.grad is not None]
            assert not left, f"{type(module).__name__} has gradients at {left[:3]}"
        return digest([*(dict(module.state_dict()) for module in modules), repr(self.model.model_options)])


class _Node:
    CATEGORY, FUNCTION = "trials", "run"
    INPUT_TYPES = classmethod(lambda _cls: {"required": {}})


def register(things: Things, results: list[Any]) -> None:
    """The nodes that give the things and take the results."""
    import nodes

    class TrialThings(_Node):
        RETURN_TYPES = tuple(TYPES.values())

        def run(self) -> tuple:
            return tuple(getattr(things, name) for name in TYPES)

    class TrialResults(_Node):
        RETURN_TYPES, OUTPUT_NODE = (), True
        INPUT_TYPES = classmethod(lambda _cls: {"optional": {f"r{number}": ("*",) for number in range(9)}})

        def run(self, **given: Any) -> dict:
            results[:] = [given[name] for name in sorted(given)]
            return {}

    nodes.NODE_CLASS_MAPPINGS |= {"TrialThings": TrialThings, "TrialResults": TrialResults}


def prompt(name: str, patch: str) -> dict[str, Any]:
    """The graph of a case, in API form."""
    case, patching = CASES[name], PATCHES[patch]
    model = ["patch", 0] if patching else _link("@model")
    graph = {"things": _node("TrialThings", {})}
    if patching:
        graph["patch"] = _node(patching[0], {"model": _link("@model"), **patching[1]})
    graph["inversion"] = _node("LikenessInvert", {**_inputs(Case("LikenessInvert", INVERTED)), "model": model})
    graph[TARGET] = _node(case.node, {**_inputs(case), "model": model})
    last, count = TARGET, len(_schema(case.node).outputs)
    if case.sampled:
        own = {output.display_name: [TARGET, number] for number, output in enumerate(_schema(case.node).outputs)}
        given = {name: own.get(name, _link(f"@{name}")) for name in ("model", "latent", "positive", "negative")}
        given["latent_image"] = given.pop("latent")
        settings = {"add_noise": True, "noise_seed": 1, "cfg": 4.0}
        given |= {**settings, "sampler": _link("@sampler"), "sigmas": _link("@sigmas")}
        graph["sample"], last, count = _node("SamplerCustom", given), "sample", 2
    graph["results"] = _node("TrialResults", {f"r{number}": [last, number] for number in range(count)})
    return graph


def _node(kind: str, inputs: dict[str, Any]) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def _schema(kind: str) -> Any:
    import nodes

    return nodes.NODE_CLASS_MAPPINGS[kind].GET_SCHEMA()


def _link(value: Any) -> Any:
    if not isinstance(value, str) or not value.startswith("@"):
        return value
    return ["inversion", 0] if value == "@trajectory" else ["things", list(TYPES).index(value[1:])]


def _inputs(case: Case) -> dict[str, Any]:
    """All that the node requires: as the case says, from the things by name, or its default."""
    found = {name: _link(value) for name, value in case.inputs.items()}
    for widget in _schema(case.node).inputs:
        if widget.id in found or widget.optional:
            continue
        default = getattr(widget, "default", None)
        found[widget.id] = _link(f"@{widget.id}") if default is None else default
    return found
