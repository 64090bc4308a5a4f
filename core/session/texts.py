"""Texts of users in messages: logs and consoles may know ASCII only, and what they cannot write stops ComfyUI's worker.

A lone surrogate (JSON allows it) or Chinese on a console of another code page raises inside of the log's handler, which
ComfyUI does not survive.
"""

import contextlib
import logging
from collections.abc import Iterator

LOGGER = "likeness"


def plain(text: str) -> str:
    """ASCII, with everything else as an escape: \\u72d7."""
    return text.encode("ascii", "backslashreplace").decode("ascii")


@contextlib.contextmanager
def ascii_only() -> Iterator[None]:
    """An exception that leaves with a text beyond ASCII leaves as one of its kind without, and without its causes."""
    try:
        yield
    except (ValueError, RuntimeError, OSError, LookupError, TypeError, AttributeError) as error:
        if not _beyond_ascii(error):
            raise
        replaced = type(error) if type(error) in (ValueError, RuntimeError, FileNotFoundError) else RuntimeError
        raise replaced(plain(str(error))).with_traceback(error.__traceback__) from None


@contextlib.contextmanager
def disk_errors() -> Iterator[None]:
    """An error of the disk leaves as a sentence; those of the pack's own, which have no number, as they are."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        name = str(error.filename or "A file")
        raise RuntimeError(
            f"{name} cannot be read or written ({error.strerror}): make room on that disk, or let ComfyUI use the file "
            "and its folder, then queue again."
        ) from error


def _beyond_ascii(error: BaseException | None) -> bool:
    """Whether this error, or one that stands behind it in a traceback, has such a text."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if not str(error).isascii():
            return True
        error = error.__cause__ or error.__context__
    return False


def _plain_record(record: logging.LogRecord) -> bool:
    text = record.getMessage()
    if not text.isascii():
        record.msg, record.args = plain(text), None
    return True


def keep_log_plain() -> None:
    """The pack's own log lines, and theirs alone. May be called repeatedly."""
    logging.getLogger(LOGGER).addFilter(_plain_record)
