"""The tables of models say what the tests show."""

from __future__ import annotations

from dataclasses import replace

import pytest

from .. import model_table


@pytest.mark.parametrize("page", model_table.PAGES)
def test_the_page_holds_the_table_that_the_tests_give(page):
    text = (model_table.ROOT / page).read_text(encoding="utf-8")
    assert model_table.written(text, page) == text, "run `python toolbox/_load.py tests.model_table`"


def test_what_no_test_shows_is_not_called_tested():
    step = model_table.STEPS[0]
    absent = replace(step, each="test_families.py::test_of_something_else")
    with pytest.raises(ValueError, match="which is not there"):
        model_table.cells(absent)
    with pytest.raises(ValueError, match="does not run with each_family"):
        model_table.cells(replace(step, each="test_guidance.py::test_the_base_model_is_as_it_was"))
    found = model_table.cells(replace(step, each="", unets=("adapter",)))
    assert found["SDXL"] == found["Z-Image"] == "in principle" and found["SD1.x"] == "tested"
