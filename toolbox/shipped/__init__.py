"""Descriptions of the shipped graphs, by the name of their files in workflows/."""

from __future__ import annotations

from collections.abc import Callable

from ..drawing import Drawing
from . import (
    ezigen,
    ezigen_train,
    ezigen_uses,
    hifi,
    hifi_ablation,
    hiper,
    inversion,
    sine,
    sine_uses,
    siso,
    siso_edit,
    siso_reuse,
    siso_sana,
)

GRAPHS: dict[str, Callable[[Drawing], None]] = {
    **hiper.GRAPHS,
    **sine.GRAPHS,
    **sine_uses.GRAPHS,
    **inversion.GRAPHS,
    **hifi.GRAPHS,
    **hifi_ablation.GRAPHS,
    **siso.GRAPHS,
    **siso_reuse.GRAPHS,
    **siso_edit.GRAPHS,
    **siso_sana.GRAPHS,
    **ezigen.GRAPHS,
    **ezigen_uses.GRAPHS,
    **ezigen_train.GRAPHS,
}
