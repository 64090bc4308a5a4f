"""Word swap of prompt-to-prompt (Hertz 2022, arXiv 2208.01626), in the form of HiFi Tuner (arXiv 2312.00079), Alg. 3.

An image and its edit are denoised side by side. In each cross-attention layer a_src [T, N] is the attention of each of
T places of the image to each of N tokens of the source prompt. The edit's layer uses

    a[:, j] = sum_w a_src[:, w] Map[w, j]    for the tokens j that both prompts share,
    a[:, j] = a_edit[:, j]                   for the new subject's tokens: its word, and a learned embedding's,

with the edit prompt's values. So everything but the subject stays where it was. Prompt-to-prompt has no tokens of the
second kind. Algorithm 3 never ends the control, prompt-to-prompt ends it at 0.8 of the steps.

Source of Map: get_replacement_mapper in the reference code's seq_aligner. If the new word has another number of tokens,
they share the old word's attention evenly, and all later tokens shift. Deviations, each with its reason:
- after the last swapped word the reference code continues with Map[j, j] = 1, which would give the words after a longer
  word their neighbours' attention; here they shift, as between two swapped words in the reference code. After a shorter
  word the edit's last tokens have no source token; they use the source's last one, and so receive padding's attention;
- the sum over a row of `a` is no longer 1, and neither paper says what to do. An option divides by it;
- where image and text attend in one layer (FLUX, Qwen-Image), the attention to the prompt's tokens is treated so, and
  that to the image is the edit's own.

Prompt-to-prompt's local blend is optional too (Algorithm 3 has none): after each step the edit's latent is the
source's, except where the attention to either prompt's word exceeds a share of the maximum. Source: LocalBlend in the
reference notebook. Deviations, each with its reason:
- the maps of all layers count, at the latent's size, not only those of 16 x 16 cells, because latents of other sizes
  may have no such layer; the neighbourhood of 3 of 16 cells becomes the same fraction of the latent;
- the share is of the attention's range, because in small networks the minimum is not near 0;
- a mask may replace the maps; it then applies from the first step on.
"""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..inversion.rectify import landing_prediction
from .maps import probabilities

END_PERCENT = 1.0  # Algorithm 3; prompt-to-prompt: 0.8
SELF_CELLS = 32**2  # prompt-to-prompt copies self-attention in layers of at most this many places
BLEND_START = 0.2  # of the sampling: earlier maps carry little information
BLEND_CELLS = 16  # side of the maps in the reference code


@dataclass(frozen=True)
class Swap:
    """A word of `old` tokens that begins at token `start` of the prompt becomes one of `new` tokens. end: behind the
    last token of its text encoder, where the prompt holds several encoders' tokens; None for the prompt's.
    """

    start: int
    old: int
    new: int
    end: int | None = None


def word_swap(source: Sequence[Hashable], edit: Sequence[Hashable], word: Sequence[Hashable]) -> Swap:
    """The swap between two prompts' tokens, given without begin and end.

    ValueError unless the word occurs exactly once in the source and nothing else differs.
    """
    places = [i for i in range(len(source) - len(word) + 1) if list(source[i : i + len(word)]) == list(word)]
    if len(places) != 1 or not word:
        raise ValueError(f"The word is {len(places)} times in the prompt, expected once.")
    start, old = places[0], len(word)
    new = len(edit) - len(source) + old
    behind = list(source[start + old :])
    if new < 1 or list(edit[:start]) != list(source[:start]) or list(edit[start + new :]) != behind:
        raise ValueError("The two prompts differ in more than the word.")
    return Swap(1 + start, old, new)  # behind the begin


def token_swap(source: Sequence[Hashable], edit: Sequence[Hashable]) -> Swap | None:
    """The part in which two prompts' tokens differ, at least one token of each; None for equal prompts. For encoders
    whose tokens hold their spaces, so that a word's own tokens are not those in the prompt.
    """
    if list(source) == list(edit):
        return None
    shorter = min(len(source), len(edit))
    start = next((i for i in range(shorter) if source[i] != edit[i]), shorter)
    behind = next((i for i in range(shorter - start) if source[-1 - i] != edit[-1 - i]), shorter - start)
    if start + behind == shorter:  # the shorter one has nothing in that place
        start, behind = (start - 1, behind) if start else (0, behind - 1)
    return Swap(start, len(source) - start - behind, len(edit) - start - behind)


def column_map(swap: Swap, rows: int) -> Tensor:
    """Map [rows, rows]: the share of each source token's attention that goes to each token of the edit."""
    end = swap.end or rows
    origin = (torch.arange(rows) - swap.new + swap.old).clamp(max=end - 1)
    behind = torch.arange(rows).unsqueeze(1) == origin
    mapping = torch.eye(rows)
    mapping[:, swap.start : end] = behind[:, swap.start : end].float()
    if swap.new != swap.old:  # words with the same number of tokens map one to one
        of_word = slice(swap.start, swap.start + swap.new)
        mapping[:, of_word] = 0.0
        mapping[swap.start : swap.start + swap.old, of_word] = 1.0 / swap.new
    return mapping


def edit_columns(swap: Swap, rows: int, tail: int = 0) -> Tensor:
    """[rows], True for the edit's own tokens: the new word's, and the last `tail`."""
    is_edit = torch.zeros(rows, dtype=torch.bool)
    is_edit[swap.start : swap.start + swap.new] = True
    is_edit[rows - tail :] = True
    return is_edit


def controlled_attention(
    source: Tensor, edit: Tensor, mapping: Tensor, is_edit: Tensor, renormalise: bool = False
) -> Tensor:
    """The edit's attention [..., T, k * N] from the source's and its own.

    mapping [N, N] from column_map(), is_edit [N] from edit_columns(). k > 1: ComfyUI repeats a prompt to the length of
    a longer one.
    """
    rows = mapping.shape[0]
    times = source.shape[-1] // rows
    from_source = (source.unflatten(-1, (times, rows)) @ mapping.to(source)).flatten(-2)
    attention = torch.where(is_edit.to(source.device).repeat(times), edit, from_source)
    return attention / attention.sum(-1, keepdim=True) if renormalise else attention


def correction(
    q: Tensor, k: Tensor, v: Tensor, heads: int, mapping: Tensor, is_edit: Tensor, renormalise: bool = False
) -> Tensor:
    """The change that control makes to the edit's attention output: [T, heads * d], float32.

    q [2, T, heads * d], k and v [2, N, heads * d]: the source's and the edit's. 0 if all tokens are the edit's own.
    """
    source, edit = probabilities(q, k, heads)
    change = controlled_attention(source, edit, mapping, is_edit, renormalise) - edit
    values = v[1].float().unflatten(-1, (heads, -1)).transpose(0, 1)
    return (change @ values).transpose(0, 1).flatten(1)


def joint_correction(
    parts: Iterable[tuple[slice, Tensor]], out: Tensor, v: Tensor, mapping: Tensor, is_edit: Tensor, renormalise: bool
) -> None:
    """correction() where the keys are more than the prompt's, added to out [heads, T, d], the edit's attention output.

    parts: column_probabilities() of the source and the edit for the prompt's tokens; v [heads, N, d], the edit's values
    of these.
    """
    for part, (source, edit) in parts:
        change = controlled_attention(source, edit, mapping, is_edit) - edit
        controlled = out[:, part].float() + change @ v.float()
        out[:, part] = controlled / (1 + change.sum(-1, keepdim=True)) if renormalise else controlled


def blend_mask(attention: Tensor, share: float) -> Tensor:
    """Where the edit may differ, [1, h, w] bool. attention [2, h, w]: to each prompt's word."""
    reach = max(1, round(min(attention.shape[-2:]) / BLEND_CELLS))
    pooled = torch.nn.functional.max_pool2d(attention[:, None], 2 * reach + 1, 1, reach)
    low, high = (extreme((-2, -1), keepdim=True) for extreme in (pooled.amin, pooled.amax))
    return (pooled > low + share * (high - low)).any(0)


def blend_predictions(x: Tensor, denoised: Tensor, sigma: float, following: float, mask: Tensor) -> Tensor:
    """Predictions [2, C, h, w] that make an Euler step to level `following` end in the same latent outside the mask."""
    source, edit = x + (following - sigma) * (x - denoised) / sigma
    target = torch.where(mask.to(x.device), edit, source)
    return torch.stack([denoised[0], landing_prediction(x[1], sigma, target, following)])
