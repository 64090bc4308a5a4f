"""Make a loaded ComfyUI model temporarily differentiable, and restore it exactly.

ComfyUI runs nodes under torch.inference_mode(), so weights may be inference tensors, which autograd cannot save for
backward. Which weights are depends on which node loaded the model first, so every weight is checked every time.
"""

import contextlib
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import comfy.ldm.common_dit
import comfy.model_management as mm
import comfy.ops
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy.patcher_extension import WrappersMP
from torch import Tensor, nn

from ..lora.low_rank import LISTS, is_attention

GUIDANCE_PREFIX = "likeness.guidance"  # key prefix of everything the pack attaches to a MODEL for sampling only
POST_CFG = "sampler_post_cfg_function"
SAMPLING = (WrappersMP.PREDICT_NOISE, WrappersMP.CALC_COND_BATCH)  # what wraps these decides what a step predicts
COMPILED = "torch.compile"  # key of ComfyUI's wrapper around a compiled network
WINDOWS, NOTES = "context_handler", "torch_compile_kwargs"  # model_options: context windows, and notes of the above
GUIDANCE = (
    "sampler_cfg_function",
    "sampler_pre_cfg_function",
    POST_CFG,
    "sampler_calc_cond_batch_function",
)
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, *FP8)
log = logging.getLogger("likeness")


@contextlib.contextmanager
def replaced(owner: Any, **values: Any) -> Iterator[None]:
    """Attributes of a module or object with other values; those that it did not have are gone afterwards."""
    before = {name: vars(owner)[name] for name in values if name in vars(owner)}
    try:
        for name, value in values.items():
            setattr(owner, name, value)
        yield
    finally:
        for name in values:
            if name in before:
                setattr(owner, name, before[name])
            else:
                delattr(owner, name)


@contextlib.contextmanager
def gradients() -> Iterator[None]:
    """Leave inference mode and record gradients; also set newer ComfyUI's training flag, at which some model families
    avoid fused kernels. Where a model calls those for rotary positions without looking at it (Cosmos-Predict2, Anima),
    ComfyUI's own plain versions, which have a backward pass, take over.
    """
    fused, plain = (sys.modules.get(f"comfy_kitchen{part}") for part in ("", ".backends.eager"))
    names = [name for name in getattr(plain, "__all__", ()) if "rope" in name and hasattr(fused, name)]
    kernels = replaced(fused, **{name: getattr(plain, name) for name in names})
    with torch.inference_mode(False), torch.enable_grad(), replaced(mm, in_training=True), kernels:
        yield


@contextlib.contextmanager
def thawed(
    modules: Iterable[nn.Module], trained: Mapping[str, nn.Module] | None = None
) -> Iterator[tuple[dict[str, nn.Parameter], dict[str, Tensor]]]:
    """Replace all inference parameters and buffers, and a latent format's scales, by equal normal tensors without
    memory of their own. Those that ComfyUI casts in every forward stay, since autograd sees only the result of the
    cast; they collect no gradients meanwhile. The original objects come back, so that ModelPatcher's backups and other
    nodes that share the module remain valid.

    trained: modules, by prefix, whose weights become trainable float32 leaves; yields them by their full names, and the
    loaded weights whose place they take, not copied.
    """
    with contextlib.ExitStack() as stack:

        def put(store: Any, name: str, value: Any) -> None:
            stack.callback(store.__setitem__, name, store[name])
            store[name] = value

        leaves, before = dict[str, nn.Parameter](), dict[str, Tensor]()
        by_id: dict[int, nn.Parameter] = {}  # a shared weight gets a single leaf
        for prefix, module in (trained or {}).items():
            for path, value in list(module.named_parameters(prefix, remove_duplicate=False)):
                owner, _, name = path.removeprefix(f"{prefix}.").rpartition(".")
                if id(value) not in by_id:
                    leaves[path] = by_id[id(value)] = nn.Parameter(value.detach().to(torch.float32, copy=True))
                    before[path] = value.detach()
                put(module.get_submodule(owner)._parameters, name, by_id[id(value)])
        own = {id(leaf) for leaf in leaves.values()}
        for module in modules:
            dtype = getattr(module, "manual_cast_dtype", None)
            scales = getattr(getattr(module, "latent_format", None), "__dict__", {})
            for name, value in dict(scales).items():
                if isinstance(value, Tensor) and value.is_inference():
                    put(scales, name, value.clone())
            for part in module.modules():
                for store in (part._parameters, part._buffers):
                    for name, value in store.items():
                        if value is None or id(value) in own:
                            continue
                        if value.is_inference() and not _is_cast(part, name, value, dtype):
                            put(store, name, _normal(value, store is part._parameters))
                        elif value.requires_grad:  # loaded outside of inference mode, or cast with a gradient
                            value.requires_grad_(False)  # inference mode alone may set it for inference tensors
                            stack.callback(torch.inference_mode()(value.requires_grad_), True)
        yield leaves, before


def _is_cast(part: nn.Module, name: str, value: Tensor, compute_dtype: torch.dtype | None) -> bool:
    """Whether a layer casts this weight to a new tensor in every forward: always in fp8, and in half precision when the
    model's compute dtype differs.
    """
    casts = isinstance(part, comfy.ops.CastWeightBiasOp) and part.comfy_cast_weights and name in ("weight", "bias")
    if not casts or type(value) is not nn.Parameter:
        return False
    half = value.dtype in (torch.float16, torch.bfloat16)
    return value.dtype in FP8 or (half and compute_dtype is not None and compute_dtype != value.dtype)


def _normal(value: Tensor, parameter: bool) -> Tensor:
    """An equal normal tensor, which is the same memory; a copy of packed weights, and on backends without storages."""
    same = value.detach()
    place = same.storage_offset(), same.shape, same.stride()
    empty = torch.empty(0, dtype=same.dtype, device=same.device)
    try:
        normal = empty.set_(same.untyped_storage(), *place) if _plain(value) else same.clone()
    except RuntimeError:
        normal = same.clone()
    return nn.Parameter(normal, requires_grad=False) if parameter else normal


@contextlib.contextmanager
def out_of_place(module: nn.Module) -> Iterator[None]:
    """Keep blocks that add to their input in place (ComfyUI's CLIP layers, FLUX) from overwriting what backward needs.

    Plain autograd detects this and raises; checkpointing does not and gives wrong gradients. Each layer norm gets a
    copy of its input, so the tensor it saves is never modified. Where a block has none and calls a function instead
    (LTXV), the function copies, and the block's attention, whose input is the block's, gets a copy.
    """
    original = comfy.ldm.common_dit.rms_norm

    def rms_norm(x: Tensor, weight: Tensor | None = None, *args: Any, **more: Any) -> Tensor:
        return original(x.clone() if weight is None else x, weight, *args, **more)

    with contextlib.ExitStack() as stack:
        stack.enter_context(replaced(comfy.ldm.common_dit, rms_norm=rms_norm))
        for part in module.modules():
            children = [] if isinstance(part, LISTS) else list(part.children())
            norms = any("norm" in type(child).__name__.lower() for child in children)
            copies = [] if norms else [child for child in children if is_attention(child)]
            for copied in [*copies, *([part] if isinstance(part, nn.LayerNorm) else [])]:
                stack.callback(copied.register_forward_pre_hook(_copy_input).remove)
        yield


def _copy_input(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (*(value.clone() for value in inputs[:1]), *inputs[1:])


@contextlib.contextmanager
def calls(modules: Iterable[nn.Module], note: Callable[[int], None]) -> Iterator[None]:
    """Note the id of a part of the modules whenever it runs."""
    with contextlib.ExitStack() as stack:
        for part in (part for module in modules for part in module.modules()):
            stack.callback(part.register_forward_pre_hook(lambda module, _inputs: note(id(module))).remove)
        yield


@contextlib.contextmanager
def private_skips(unet: nn.Module) -> Iterator[None]:
    """Keep a ControlNet from overwriting tensors that backward needs.

    ComfyUI adds a ControlNet's output in place to the skip connections, after the next block has used them. Every block
    gets a copy of its input, so nothing else uses the skip connections. Models without a UNet are left alone.
    """
    blocks = [*[*getattr(unet, "input_blocks", [])][1:], getattr(unet, "middle_block", None)]
    with contextlib.ExitStack() as stack:
        for block in filter(None, blocks):
            stack.callback(block[0].register_forward_pre_hook(_copy_input).remove)
        yield


def differentiable_attention(_original: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    return attention_pytorch(*args, **kwargs)


def fixed_clone(patcher: Any) -> Any:
    """A clone of a ModelPatcher whose weights stay in place; RuntimeError when ComfyUI cannot make one."""
    if not getattr(patcher, "is_dynamic", lambda: False)():
        return patcher.clone()
    try:
        return patcher.clone(disable_dynamic=True, force_deepcopy=True)
    except RuntimeError as error:
        raise RuntimeError(
            "This model's weights are streamed by ComfyUI's dynamic VRAM and its loader cannot reload them for "
            "training: load it with Load Checkpoint, or start ComfyUI with --disable-dynamic-vram."
        ) from error


class Playback:
    """Base class of post-CFG functions that only replay a recorded trajectory, for which no guidance warning is due."""


def is_pack_guidance(key: Any) -> bool:
    """Whether a wrapper or attachment with this key is the pack's guidance, which applies to sampling only."""
    return isinstance(key, str) and key.startswith(GUIDANCE_PREFIX)


def warn_of_guidance(model: Any) -> None:
    """Warn that other nodes' guidance is left out of an optimisation whose result a sampling should match exactly."""
    options = {name: model.model_options.get(name) for name in GUIDANCE}
    options[POST_CFG] = [each for each in options[POST_CFG] or [] if not isinstance(each, Playback)]
    names = [name for name, value in options.items() if value]
    names += sorted(filter(is_pack_guidance, model.wrappers.get(WrappersMP.CALC_COND_BATCH, {})))
    if names:
        log.warning(
            "The model carries guidance (%s), which is left out here: sampled with it, the result will "
            "not be met. Connect the model from before those nodes, to the sampler too.",
            ", ".join(names),
        )


def sampling_keys(wrappers: dict[str, dict[Any, Any]]) -> set[Any]:
    """The keys of a MODEL's wrappers that belong to something that lives in the steps of a sampling, such as EasyCache.

    An optimization or inversion has no such steps: an earlier one that is used again gives wrong results there, or no
    gradient. A key that wraps the prediction of a step wraps the network for the same purpose. A compiled network has
    no backward pass, and its weights could not be replaced.
    """
    keys = {key for kind in SAMPLING for key in wrappers.get(kind, {})} | {COMPILED}
    return {key for key in keys if not str(key).startswith("likeness")}


def drop_guidance(clone: Any) -> None:
    """Remove from a clone what is for sampling only: guidance, since losses and inversions use the model's own
    prediction, and what lives in the steps of a sampling, whose names are logged.
    """
    for name in (*GUIDANCE, NOTES):
        clone.model_options.pop(name, None)
    for key in filter(is_pack_guidance, list(clone.additional_models)):
        clone.remove_additional_models(key)
    keys, names = sampling_keys(clone.wrappers), set[str]()
    for kind, by_key in clone.wrappers.items():
        of_steps = keys & by_key.keys() - (set() if kind in SAMPLING else {None})
        names |= set(map(str, of_steps))
        for key in [*filter(is_pack_guidance, by_key), *of_steps]:
            del by_key[key]
    if clone.model_options.pop(WINDOWS, None) is not None:
        names.add("context windows")
    for patch in clone.object_patches.keys() - uncompiled(clone.object_patches).keys():
        names.add(f"{COMPILED} of {patch}")
        del clone.object_patches[patch]
    if names:
        log.info("Left out here: %s, which belongs to sampling steps.", ", ".join(sorted(names)))


def uncompiled(object_patches: Mapping[str, Any]) -> dict[str, Any]:
    """Without the compiled modules that other packs put in the place of a network's own."""
    return {name: value for name, value in object_patches.items() if not hasattr(value, "_orig_mod")}


def trainable_clone(model: Any, cast: bool = False, exact: bool = False) -> Any:
    """A clone of a MODEL with a differentiable forward: fixed weights, attention with a backward pass, safe precision.

    cast: the weights will be float32 whatever the compute dtype. exact: compute in float32 where fp16 is unsafe.
    """
    clone = fixed_clone(model)
    drop_guidance(clone)
    options = clone.model_options["transformer_options"] = clone.model_options.get("transformer_options", {}).copy()
    options["optimized_attention_override"] = differentiable_attention
    dtype = model.model_dtype()
    if dtype == torch.float16 and not mm.is_device_cpu(model.load_device):
        # Gradients of a diffusion loss underflow in fp16; bf16 has the range, at the same speed and memory.
        use_bf16 = mm.should_use_bf16(model.load_device) and not exact
        clone.set_model_compute_dtype(torch.bfloat16 if use_bf16 else torch.float32)
    elif cast and dtype != torch.float32 and model.get_model_object("manual_cast_dtype") is None:
        clone.set_model_compute_dtype(dtype)
    return clone


def check_trainable_weights(modules: Iterable[nn.Module]) -> None:
    """ValueError when weights are stored in a quantised format, which cannot take small updates."""
    trainable = (torch.float32, torch.float16, torch.bfloat16)
    values = [value for module in modules for value in module.parameters() if not _plain(value, trainable)]
    formats = {str(value.dtype) if _plain(value) else type(value).__name__ for value in values}
    if formats:
        raise ValueError(
            f"All weights cannot be trained from {', '.join(sorted(formats))}: load the model in fp16, bf16 or fp32, "
            "or train a LoRA."
        )


def is_packed(layer: nn.Module) -> bool:
    """Whether a layer's stored weight differs from the one it computes with: quantised, or scaled when used."""
    weight = getattr(layer, "weight", None)
    return weight is not None and (not _plain(weight, FLOATS) or getattr(layer, "scale_weight", None) is not None)


def _plain(value: Tensor, dtypes: Sequence[torch.dtype] | None = None) -> bool:
    """Whether this is a plain torch tensor of one of these dtypes; quantised subclasses may report any dtype."""
    return type(value) in (nn.Parameter, Tensor) and (dtypes is None or value.dtype in dtypes)


def load_fully(models: list[Any], memory_required: float) -> None:
    """Load every model fully. RuntimeError when one does not fit: offloaded weights give silently wrong gradients."""
    mm.load_models_gpu(models, memory_required=memory_required, force_full_load=True)
    for model in models:
        check_fully_loaded(model)


def check_fully_loaded(model: Any) -> None:
    """RuntimeError when part of the model's weights is offloaded or streamed."""
    partial = getattr(model.model, "model_lowvram", False) or any(hasattr(part, "_v") for part in model.model.modules())
    if partial:
        size, free = model.model_size() / 2**30, mm.get_free_memory(model.load_device) / 2**30
        raise RuntimeError(
            f"The model ({size:.1f} GB) does not fit whole beside what training needs ({free:.1f} GB are free), and "
            "a partly loaded model cannot be trained through: switch checkpointing on where the node has it, use a "
            "smaller image or an fp8 file of the model, or free VRAM (Unload Models)."
        )
