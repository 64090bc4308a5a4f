"""A custom node folder for the trials over HTTP: a node that gives any value of the tables, well or malformed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

_spec = importlib.util.spec_from_file_location("trial_forms", Path(__file__).resolve().parents[1] / "forms.py")
assert _spec is not None and _spec.loader is not None
forms = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(forms)


class AnyType(str):
    """Fits each input."""

    def __ne__(self, _other: object) -> bool:
        return False

    __hash__ = str.__hash__


class TrialValue:
    """A value of forms.py by its names, a number or text as JSON, or an object with these attributes."""

    CATEGORY, FUNCTION, RETURN_TYPES = "trials", "value", (AnyType("*"),)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {"required": {name: ("STRING", {}) for name in ("table", "kind", "form")}}

    def value(self, table: str, kind: str, form: str) -> tuple[Any]:
        if table == "json":
            return (json.loads(form),)
        if table == "object":
            return (SimpleNamespace(**dict.fromkeys(form.split())),)
        if table == "malformed":
            return (forms.BY_TYPE.get(kind, forms.OBJECTS)[form],)
        tables = {"well formed": forms.WELL_FORMED, "unfit": forms.UNFIT, "texts": forms.TEXTS}
        found = tables[table]
        return (found[kind][form] if table == "unfit" else found[form if table == "texts" else kind],)


NODE_CLASS_MAPPINGS = {"TrialValue": TrialValue}
