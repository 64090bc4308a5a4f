"""The LIKENESS_EMBEDDING artifact: token embeddings learned from a subject, with the metadata needed to use them.

One tensor [T, n, d] for each saved step. T is 1 for an embedding used at every denoising step (HiPer) and the number of
denoising steps for a step-wise one, whose header gives the time window of each in "windows". The header's "placement"
says where the tokens stand in a prompt (conditioning.py); files without it replace the last ones.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..files import FORMAT, check_header, check_tensor, read_plain, read_tensors, write_tensors
from ..prompt.conditioning import PLACEMENTS, TAIL_OF_PADDING, Placement
from ..prompt.windows import PercentRange

KIND = "embedding"
MAX_BYTES = 512 << 20  # 16 saved steps, each with 50 denoising steps of 77 tokens of width 2048
TEXTUAL_INVERSION = ("emb_params", "string_to_param", "clip_l", "clip_g", "t5xxl", "<concept>")  # names in its files
STEP_KEY = "step_{:06d}"
RECOMMENDED_STEP = 1000  # HiPer trains 1500 steps and uses this one; later steps lose editability


@dataclass(frozen=True)
class Embedding:
    """rows: saved step -> [T, n, d] float32 on the CPU. header: method, base, settings, seed, losses (JSON values)."""

    rows: dict[int, Tensor]
    header: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.rows:
            raise ValueError("The embedding holds no saved step: train it again.")
        shapes = {tuple(value.shape) for value in self.rows.values()}
        if len(shapes) != 1 or len(next(iter(shapes))) != 3 or 0 in next(iter(shapes)):
            raise ValueError(
                f"The embedding holds tables of shapes {sorted(shapes)}, expected one shape [steps, tokens, width]: "
                f"train it again."
            )
        if self.placement not in PLACEMENTS:
            raise ValueError(
                f"The embedding's placement is {self.placement!r:.80}, expected tail or append: train it again."
            )
        if self.denoising_steps > 1 and not _tile(self.header.get("windows"), self.denoising_steps):
            raise ValueError(
                f"The embedding has rows for {self.denoising_steps} denoising steps, but not a time window for each: "
                "train it again."
            )

    @property
    def placement(self) -> Placement:
        return self.header.get("placement", TAIL_OF_PADDING)

    @property
    def denoising_steps(self) -> int:
        return next(iter(self.rows.values())).shape[0]

    @property
    def windows(self) -> list[PercentRange]:
        """The time window of each of the T steps, in percent of the sampling; empty for T = 1."""
        return [(start, end) for start, end in self.header["windows"]] if self.denoising_steps > 1 else []

    @property
    def tokens(self) -> int:
        return next(iter(self.rows.values())).shape[1]

    @property
    def width(self) -> int:
        return next(iter(self.rows.values())).shape[2]

    @property
    def recommended_step(self) -> int:
        """The step that was chosen by its images (best_step.py), or else the last saved one up to the published one."""
        best = self.header.get("best")
        if isinstance(best, int) and best in self.rows:
            return best
        return max((step for step in self.rows if step <= RECOMMENDED_STEP), default=min(self.rows))

    def at(self, step: int) -> Tensor:
        """The tokens [T, n, d] of a saved step, 0 for the recommended one. ValueError for a step that was not saved."""
        number = step or self.recommended_step
        if number not in self.rows:
            saved = ", ".join(map(str, sorted(self.rows)))
            raise ValueError(f"Step {step} of the embedding was not saved: choose 0 (recommended) or one of {saved}.")
        return self.rows[number]

    def describe(self) -> str:
        base = self.header.get("base", {})
        losses = self.header.get("losses") or []
        step_wise = f", others at each of {self.denoising_steps} denoising steps" if self.denoising_steps > 1 else ""
        lines = [
            f"{self.header.get('method', 'unknown method')}: {self.tokens} tokens of width {self.width}{step_wise}",
            f"base model: {base.get('family', 'not recorded')} ({base.get('prediction', 'prediction not recorded')})",
            f"saved steps: {', '.join(map(str, sorted(self.rows)))}; recommended {self.recommended_step}"
            + (" (best by its images)" if "best" in self.header else ""),
        ]
        if losses:
            lines.append(f"loss: first {losses[0]:.4f}, last {losses[-1]:.4f}")
        return "\n".join(lines)


def _tile(windows: Any, count: int) -> bool:
    """Whether these are `count` pairs of numbers that cover 0 to 1 without gaps."""
    if not isinstance(windows, (list, tuple)) or len(windows) != count:
        return False
    if not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in windows):
        return False
    flat = [edge for pair in windows for edge in pair]
    if not all(isinstance(edge, (int, float)) and 0 <= edge <= 1 for edge in flat):
        return False
    return flat == sorted(flat) and flat[0] == 0 and flat[-1] == 1 and flat[1:-1:2] == flat[2:-1:2]


def save_embedding(path: Path, embedding: Embedding, *, replace: bool = True) -> None:
    tensors = {STEP_KEY.format(step): rows for step, rows in embedding.rows.items()}
    write_tensors(path, tensors, {**embedding.header, "format": FORMAT, "kind": KIND}, replace=replace)


def load_embedding(path: Path) -> Embedding:
    """Read a file of this pack, or a tensor saved by HiPer's reference code (.pt, read without running code in it).

    Raises ValueError for anything else.
    """
    if path.suffix.lower() in {".pt", ".pth"}:
        return _load_official(path)
    tensors, header = read_tensors(path, MAX_BYTES)
    _refuse_textual_inversion(path, tensors)
    check_header(path, header, KIND, "an embedding of this pack: choose one made by Save Embedding")
    rows = {}
    for name, value in tensors.items():
        match = re.fullmatch(r"step_(\d{6,9})", name)
        if match is None or value.ndim != 3 or not value.is_floating_point():
            raise ValueError(f"{path.name} holds an unexpected tensor '{name}' {tuple(value.shape)}: train it again.")
        rows[int(match[1])] = value.float()
    return Embedding(rows, header)


def _refuse_textual_inversion(path: Path, table: Any) -> None:
    if isinstance(table, dict) and any(name in table for name in TEXTUAL_INVERSION):
        raise ValueError(
            f"{path.name} is a textual-inversion embedding, not one of this pack: put it into models/embeddings and "
            f"write embedding:{path.stem} in the prompt."
        )


def _load_official(path: Path) -> Embedding:
    value = read_plain(path, MAX_BYTES)
    _refuse_textual_inversion(path, value)
    is_table = isinstance(value, Tensor) and value.is_floating_point() and value.ndim in (2, 3)
    if not is_table or value.ndim == 3 and value.shape[0] != 1:
        raise ValueError(f"{path.name} does not hold one table of rows [tokens, width]: only HiPer's own .pt is read.")
    check_tensor(path, value)
    value = value.detach().float().reshape(1, *value.shape[-2:])
    match = re.search(r"step(\d{1,9})", path.stem)
    return Embedding({int(match[1]) if match and int(match[1]) else 1: value}, {"method": "hiper (official file)"})
