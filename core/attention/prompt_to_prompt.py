"""Word swap of prompt-to-prompt (Hertz 2022, arXiv 2208.01626), in the form of HiFi Tuner (arXiv 2312.00079), Alg. 3.

An image and its edit are denoised side by side. In each cross-attention layer a_src [T, N] says how much each of T
places of the image looks at each of N rows of the source prompt. The edit's layer uses

    a[:, j] = sum_w a_src[:, w] Map[w, j]    for the rows j that both prompts share,
    a[:, j] = a_edit[:, j]                   for the new subject's own rows: its word, and a learned embedding's,

with the edit prompt's values. So everything but the subject stays where it was. Prompt-to-prompt has no rows of the
second kind; Algorithm 3 has no step at which it ends, prompt-to-prompt ends at 0.8 of the steps.

Source of Map: get_replacement_mapper of the authors' seq_aligner. Rows of a word that becomes one of another number of
tokens share its attention evenly, and everything behind it moves. Deviations, each with its reason:
- behind the last swapped word the authors' code goes on with Map[j, j] = 1, so that words behind a longer one would get
  their neighbours' attention; here they move, as between two swapped words in their code. Behind a shorter word the
  edit's last rows have none to come from and take the source's last one, so that they are looked at as padding is;
- the sum over a row of `a` is not 1 any more; neither paper says what to do. An option divides by it.

Prompt-to-prompt's local blend is an option as well (Algorithm 3 has none): after each step the edit's latent is the
source's, except where the word of either prompt is looked at by more than a share of the most. Source: LocalBlend of
the authors' notebook. Deviations, each with its reason:
- all layers' maps count, at the latent's size, and not those of 16 x 16 cells alone, as latents of other sizes may have
  no such layer; the neighbourhood of 3 cells of 16 becomes as large a part of the latent;
- the share is of what the attention varies by, as in small networks no place looks at a word not at all;
- a mask may take the place of the maps, and then holds from the first step on.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..inversion.rectify import landing_prediction
from .maps import probabilities

END_PERCENT = 1.0  # Algorithm 3; prompt-to-prompt: 0.8
SELF_CELLS = 32**2  # prompt-to-prompt hands self-attention over in layers of at most so many places
BLEND_START = 0.2  # of the sampling: before, the maps say little
BLEND_CELLS = 16  # side of the maps that the authors blend by


@dataclass(frozen=True)
class Swap:
    """A word of `old` tokens, whose first one is row `start` of the prompt, becomes one of `new` tokens."""

    start: int
    old: int
    new: int


def word_swap(source: Sequence[Hashable], edit: Sequence[Hashable], word: Sequence[Hashable], first: int = 1) -> Swap:
    """The swap between two prompts' tokens without begin and end; `first` is the row of their first token.

    ValueError when the word is not exactly once in the source, or when something else differs too.
    """
    places = [i for i in range(len(source) - len(word) + 1) if list(source[i : i + len(word)]) == list(word)]
    if len(places) != 1 or not word:
        raise ValueError(f"The word is {len(places)} times in the prompt, expected once.")
    start, old = places[0], len(word)
    new = len(edit) - len(source) + old
    behind = list(source[start + old :])
    if new < 1 or list(edit[:start]) != list(source[:start]) or list(edit[start + new :]) != behind:
        raise ValueError("The two prompts differ in more than the word.")
    return Swap(first + start, old, new)


def column_map(swap: Swap, rows: int) -> Tensor:
    """Map [rows, rows]: how much of a row of the source prompt goes to each row of the edit."""
    origin = (torch.arange(rows) - swap.new + swap.old).clamp(max=rows - 1)
    behind = torch.arange(rows).unsqueeze(1) == origin
    found = torch.eye(rows)
    found[:, swap.start :] = behind[:, swap.start :].float()
    if swap.new != swap.old:  # the words' own tokens stand one by one for each other where there are as many
        of_word = slice(swap.start, swap.start + swap.new)
        found[:, of_word] = 0.0
        found[swap.start : swap.start + swap.old, of_word] = 1.0 / swap.new
    return found


def own_columns(swap: Swap, rows: int, tail: int = 0) -> Tensor:
    """[rows], true for the edit's own ones: the new word's, and the last `tail`."""
    found = torch.zeros(rows, dtype=torch.bool)
    found[swap.start : swap.start + swap.new] = True
    found[rows - tail :] = True
    return found


def controlled(source: Tensor, edit: Tensor, mapped: Tensor, own: Tensor, renormalise: bool = False) -> Tensor:
    """The edit's attention [..., T, k * N] from the source's and its own.

    mapped [N, N] as column_map() gives it, own [N]. k > 1: ComfyUI repeats a prompt to the length of a longer one.
    """
    rows = mapped.shape[0]
    times = source.shape[-1] // rows
    taken = (source.unflatten(-1, (times, rows)) @ mapped.to(source)).flatten(-2)
    attention = torch.where(own.to(source.device).repeat(times), edit, taken)
    return attention / attention.sum(-1, keepdim=True) if renormalise else attention


def correction(
    q: Tensor, k: Tensor, v: Tensor, heads: int, mapped: Tensor, own: Tensor, renormalise: bool = False
) -> Tensor:
    """What control adds to the edit's attention output: [T, heads * d], float32.

    q [2, T, heads * d], k and v [2, N, heads * d]: the source's and the edit's. Where nothing is taken over, it is 0.
    """
    source, edit = probabilities(q, k, heads)
    change = controlled(source, edit, mapped, own, renormalise) - edit
    values = v[1].float().unflatten(-1, (heads, -1)).transpose(0, 1)
    return (change @ values).transpose(0, 1).flatten(1)


def blend_mask(looked: Tensor, share: float) -> Tensor:
    """Where the edit may differ, [1, h, w] bool: looked [2, h, w] is how much each prompt's word is looked at."""
    reach = max(1, round(min(looked.shape[-2:]) / BLEND_CELLS))
    widened = torch.nn.functional.max_pool2d(looked[:, None], 2 * reach + 1, 1, reach)
    low, high = (extreme((-2, -1), keepdim=True) for extreme in (widened.amin, widened.amax))
    return (widened > low + share * (high - low)).any(0)


def blended(x: Tensor, denoised: Tensor, sigma: float, following: float, mask: Tensor) -> Tensor:
    """Predictions [2, C, h, w] with which an Euler step to level `following` brings both to the same latent outside of
    the mask."""
    source, edit = x + (following - sigma) * (x - denoised) / sigma
    wanted = torch.where(mask.to(x.device), edit, source)
    return torch.stack([denoised[0], landing_prediction(x[1], sigma, wanted, following)])
