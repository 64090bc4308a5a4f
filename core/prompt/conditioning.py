"""Insert learned token embeddings into a CONDITIONING: a list of [token embeddings [B, N, d], dict of options].

Where the text encoder pads its prompts, a learned embedding replaces the last n token embeddings; the prompt must end
in at least n padding tokens, or words are lost. Other encoders (most language models) end a prompt with its last word
or with a template's suffix, and the embedding is appended. Its width must be the text encoder's.
"""

import functools
import logging
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from .windows import Conditioning, PercentRange, step_wise

log = logging.getLogger("likeness")
TAIL = "likeness.tail"  # option of a prompt: the token embeddings that a learned embedding has inserted
MASK = "attention_mask"  # option of a prompt: which of its tokens the model looks at, [1, N]
Placement = Literal["tail", "append"]
PLACEMENTS: tuple[Placement, ...] = get_args(Placement)
TAIL_OF_PADDING, APPENDED = PLACEMENTS
UPDATES = 1000  # of Adam, each of which moves a number by about the learning rate: a long training
CHUNK = 77  # tokens in one pass of a CLIP text encoder: begin, up to 75 tokens, end, padding


def placement_for(model: Any, prompt: Conditioning) -> Placement:
    """Where learned tokens stand, asked of the prompt, and of the tokenizer that a MODEL names as its own: they replace
    the padding of an encoder that pads every prompt to one length; to others' prompts they are appended.
    """
    rows, options = prompt[0]
    mask = options.get(MASK)
    if not bool(rows[0, -1].any()) or mask is not None and not bool(mask[..., -1].any()):
        return TAIL_OF_PADDING  # zeros, or masked
    config = model.model.model_config
    target_of = getattr(type(config), "clip_target", None)  # newer ComfyUI's instances warn, and answer None
    target = None if target_of is None else target_of(config)
    pads = None if target is None else _pads(target.tokenizer)
    if pads is None:  # CLIP's tables are padded, and language models as a rule are not
        pads = rows.shape[1] % CHUNK == 0
    return TAIL_OF_PADDING if pads else APPENDED


@functools.cache
def _pads(tokenizer: type) -> bool | None:
    """Whether a short prompt has as many tokens as an empty one; None for a tokenizer that is part of a model file."""
    try:
        encode = tokenizer(embedding_directory=None, tokenizer_data={}).tokenize_with_weights
        empty, short = encode(""), encode("a photo of a small dog")
    except Exception:  # whatever it lacks
        return None
    return all(len(empty[name][0]) == len(short[name][0]) for name in empty)


def with_tail(context: Tensor, h: Tensor) -> Tensor:
    """[c, h]: context [B, tokens, d] with its last n tokens replaced by h [n, d]."""
    return torch.cat([context[:, : -h.shape[0]], h.to(context).expand(context.shape[0], -1, -1)], dim=1)


def with_room(conditioning: Conditioning, tokens: int, placement: Placement) -> Conditioning:
    """The same prompts with the last `tokens` of each to be replaced: its padding, or zeros appended to it. The model
    looks at them even if it does not look at padding.
    """
    more = tokens if placement == APPENDED else 0
    prompts = []
    for context, options in conditioning:
        mask = options.get(MASK)
        if mask is not None and mask.ndim == 2:
            mask = F.pad(mask[:, : mask.shape[1] - tokens + more], (0, tokens), value=1)
        prompts.append([F.pad(context, (0, 0, 0, more)), options if mask is None else {**options, MASK: mask}])
    return prompts


def padding_rows(rows: Tensor, pooled: Tensor | None) -> int | None:
    """Number of padding tokens after the end-of-text token; None when it cannot be determined.

    CONDITIONING has no token count. But a CLIP text encoder's pooled output is its last layer's embedding of the
    end-of-text token, so if the token embeddings are from that layer (SD1.x without clip skip), the token equal to the
    pooled output is the end. rows [B, 77, d], pooled [B, d].
    """
    if pooled is None or rows.shape[1] != CHUNK or pooled.shape[-1] != rows.shape[-1]:
        return None
    difference = (rows[:1].float() - pooled[:1].float().unsqueeze(1)).abs().amax(-1)[0]
    end = int(difference.argmin())
    if float(difference[end]) > 1e-2 * float(pooled[:1].abs().amax()):
        return None
    return CHUNK - 1 - end


def warn_of_no_words(positive: Conditioning, negative: Conditioning) -> None:
    """A warning when both prompts are the same, as two empty texts are: guidance would cancel the prompt."""
    pairs = [(one[0], other[0]) for one, other in zip(positive, negative, strict=False)]
    tensors = all(isinstance(each, Tensor) for pair in pairs for each in pair)
    if pairs and tensors and len(positive) == len(negative) and all(torch.equal(a.cpu(), b.cpu()) for a, b in pairs):
        log.warning("The prompt is the same as the negative prompt, or both are empty: write what you want to see.")


def size_of(rows: Tensor) -> float:
    """The size of a prompt's numbers: the median of the root mean squares of its tokens [1, N, d]. Padding counts too,
    but not zeros.
    """
    sizes = rows.float().square().mean(-1).sqrt()
    return float(sizes[sizes > 0].median()) if bool(sizes.any()) else 1.0


def warn_of_rate(rate: float, rows: Tensor) -> None:
    """A warning for a learning rate at which UPDATES of Adam could not change tokens [1, N, d] by half of their size.
    The published rates, of 0.005 and 0.01, are for CLIP's tokens, whose numbers are about 1.
    """
    size = size_of(rows)
    if rate * UPDATES < size / 2:
        log.warning(
            "learning_rate is %g, and this prompt's tokens are numbers of about %.2g: even %d updates change them by "
            "less than half, so that next to nothing is learned. Try a rate of about %.1g, a hundredth of their size.",
            *(rate, size, UPDATES, size / 100),
        )


def check_room(conditioning: Conditioning, tokens: int) -> None:
    """ValueError for an embedding that would overwrite words of the prompt; the log says when this cannot be told."""
    for rows, options in conditioning:
        count = rows.shape[1]
        if tokens >= min(CHUNK - 1, count):
            raise ValueError(
                f"{tokens} tokens do not fit into a prompt of {count}, whose first one is always used: connect an "
                "encoded text, or train with fewer tokens."
            )
        room = padding_rows(rows, options.get("pooled_output"))
        if room is None:
            # A language model's padding is long enough for nearly every prompt.
            log.log(
                logging.INFO if count % CHUNK else logging.WARNING,
                "Where this prompt of %d tokens ends cannot be told (several tables of %d, or an encoder that does not "
                "say it): the embedding replaces its last %d tokens. If these are words, shorten the prompt.",
                *(count, CHUNK, tokens),
            )
        elif tokens > room:
            raise ValueError(
                f"The embedding takes the last {tokens} rows of the prompt, but the prompt leaves only {room} unused: "
                f"shorten the prompt by {tokens - room} tokens or train with fewer tokens."
            )


def apply_embedding(
    conditioning: Conditioning,
    rows: Tensor,
    scale: float,
    windows: Sequence[PercentRange] = (),
    placement: Placement = TAIL_OF_PADDING,
) -> Conditioning:
    """A new conditioning whose last n tokens are scale * rows [T, n, d]; areas, masks and time windows are unchanged.

    Step-wise embeddings (T > 1, HiFi Tuner Algorithm 1) have one window per step, and every entry becomes T entries.
    Scale 0 disables the embedding and returns the prompt unchanged. Raises ValueError when the widths differ, or when
    the tokens would overwrite words or another embedding.
    """
    for text, _ in conditioning:
        if text.shape[-1] != rows.shape[-1]:
            raise ValueError(
                f"The embedding has width {rows.shape[-1]}, the prompt rows of width {text.shape[-1]}: it belongs to "
                "another model family, encode the prompt with the text encoder that the embedding was trained with."
            )
    if scale == 0.0:
        return [[text, options.copy()] for text, options in conditioning]
    if placement == TAIL_OF_PADDING:
        check_room(conditioning, rows.shape[1])
        for text, options in conditioning:
            tail = options.get(TAIL)
            if tail is not None and torch.equal(text[:, -tail.shape[1] :], tail.to(text)):
                raise ValueError(
                    f"The prompt holds an embedding already, in its last {tail.shape[1]} rows, which this one would "
                    "take. For two subjects encode a prompt for each, apply one embedding to each, and put them "
                    "together with Conditioning Combine (or areas)."
                )
    applied: Conditioning = []
    for text, options in with_room(conditioning, rows.shape[1], placement):
        contexts = [with_tail(text, scale * step_rows) for step_rows in rows]
        entry = [[contexts[0], options.copy()]]
        applied += entry if len(contexts) == 1 else step_wise(entry, contexts, windows)
    for text, options in applied:
        options[TAIL] = text[:, -rows.shape[1] :]
    return applied


def single_prompt(conditioning: Conditioning, role: str) -> Tensor:
    """The token embeddings [1, N, d] of a single plain prompt; ValueError when it is restricted or combined."""
    if len(conditioning) != 1:
        raise ValueError(
            f"The {role} has {len(conditioning)} prompts, expected one: connect a Text Encode node directly."
        )
    rows, options = conditioning[0]
    if rows is None or rows.ndim != 3 or rows.shape[0] != 1:
        raise ValueError(f"The {role} has no single table of text rows: connect a Text Encode node directly.")
    limits = sorted({"area", "mask", "start_percent", "end_percent"} & options.keys())
    if options.get("strength") == 0:
        limits.append("a strength of 0")
    if limits:
        raise ValueError(
            f"The {role} is limited by {', '.join(limits)}: outside of it the model would predict nothing. "
            "Train with a plain prompt; apply areas, masks and time ranges to the prompt that uses the embedding."
        )
    return rows


def detached(value: Any) -> Any:
    """Nested dicts, lists and tensors with every inference tensor replaced by a normal copy."""
    if isinstance(value, Tensor):
        return value.clone() if value.is_inference() else value
    if isinstance(value, dict):
        return {key: detached(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(detached(item) for item in value)
    return value


def start_rows(context: Tensor, empty: Tensor | None, tokens: int) -> Tensor:
    """The initial token embeddings [n, d]: the source prompt's last ones, or the empty prompt's (HiFi Tuner phi_s)."""
    source = context if empty is None else empty
    if source.shape[-1] != context.shape[-1]:
        raise ValueError(
            f"The empty prompt has width {source.shape[-1]}, the source prompt {context.shape[-1]}: use one "
            "text encoder."
        )
    return source[0][torch.arange(-tokens, 0) % source.shape[1]]  # again from the end where there are fewer
