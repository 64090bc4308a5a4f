"""No text of a user can stop a console: what leaves the pack in errors and log lines is ASCII."""

from __future__ import annotations

import io
import logging
import traceback

import pytest

from likeness.core.session.texts import LOGGER, ascii_only, disk_errors, keep_log_plain, plain

TEXTS = ["\ud800", "\u4e00\u53ea\u72d7\u5728\u8349\u5730\u4e0a", "\u0643\u0644\u0628", "\U0001f415", "dog"]


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
@pytest.mark.parametrize("kind", [ValueError, RuntimeError, FileNotFoundError, KeyError, OSError])
def test_an_error_leaves_in_ascii_with_all_that_a_traceback_prints(text, kind):
    with pytest.raises(Exception) as caught, ascii_only():  # noqa: PT011
        try:
            raise kind(f"no {text} here")
        except kind as error:
            raise ValueError(f"The word {text} is not in the prompt: choose another.") from error
    printed = "".join(traceback.format_exception(caught.value))
    assert printed.isascii() and "is not in the prompt: choose another." in str(caught.value)
    assert type(caught.value) is ValueError
    io.TextIOWrapper(io.BytesIO(), "cp1252", errors="strict").write(printed)


def test_an_ascii_error_keeps_its_causes():
    with pytest.raises(ValueError) as caught, ascii_only():  # noqa: PT011
        raise ValueError("plain") from KeyError("cause")
    assert isinstance(caught.value.__cause__, KeyError)


DISK = {
    "not allowed": PermissionError(13, "Permission denied", "/models/a.tmp"),
    "full": OSError(28, "No space left on device"),
    "gone": FileNotFoundError(2, "No such file or directory", "/models/a"),
}


@pytest.mark.parametrize("name", DISK)
def test_an_error_of_the_disk_leaves_as_a_sentence(name):
    said = r"(/models/a.*|A file) cannot be read or written \(.*\): make room"
    with pytest.raises(RuntimeError, match=said), ascii_only(), disk_errors():
        raise DISK[name]
    with pytest.raises(FileNotFoundError, match="put it there"), disk_errors():
        raise FileNotFoundError("There is no 'a': put it there.")


def test_an_interrupt_passes_as_it_is():
    class Interrupted(Exception):
        pass

    with pytest.raises(Interrupted), ascii_only():
        raise Interrupted("\u4e00")


def test_log_lines_are_ascii(monkeypatch):
    logger = logging.getLogger(LOGGER)
    monkeypatch.setattr(logger, "filters", [])
    keep_log_plain()
    keep_log_plain()
    assert len(logger.filters) == 1
    stream = io.TextIOWrapper(io.BytesIO(), "cp1252", errors="strict")
    handler = logging.StreamHandler(stream)
    handler.handleError = lambda _record: pytest.fail("the console could not write a line")
    logger.addHandler(handler)
    try:
        logger.warning("%s was taken for %s", "\u72d7", "\ud800")
    finally:
        logger.removeHandler(handler)
    stream.flush()
    assert stream.buffer.getvalue().split() == rb"\u72d7 was taken for \ud800".split()


def test_plain():
    assert plain("a\u72d7b") == "a\\u72d7b" and plain("dog") == "dog"
