"""Descriptions of the shipped graphs, by the name of their files in workflows/."""

from __future__ import annotations

from collections.abc import Callable

from ..drawing import Drawing
from . import hiper, sine, sine_uses

GRAPHS: dict[str, Callable[[Drawing], None]] = {**hiper.GRAPHS, **sine.GRAPHS, **sine_uses.GRAPHS}
