"""Scoring a batch of pictures with whichever models are connected: checks first, then measures, ranking and words."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import comfy.model_patcher
import torch
from torch import Tensor

from .. import measures
from . import folders
from .extras.lpips_files import SMALLEST, load_lpips
from .vision import BATCH, describe, embed, preprocess_of, text_missing
from .weights import load_fully

OUTSIDE = 0.05  # outside the subject is what lies below this mask value: a soft edge belongs to the edit
NOT_MEASURED = -1.0  # cosines of real pictures are above it, the other measures are never negative
