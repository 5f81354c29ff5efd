"""Orbax's voice: what it says beside the errors that it raises stays off the screen."""

from __future__ import annotations

import logging
import os
import sys
import warnings

TEMPORARY_MARK = ".orbax-checkpoint-tmp"  # Orbax's own; a directory with it in its name was not finished


class _QuietOrbax(logging.Filter):
    """Lets Orbax's warnings through, not its progress, and not the failures that it logs and then raises as well."""

    def filter(self, record: logging.LogRecord) -> bool:
        if f"{os.sep}orbax{os.sep}" not in record.pathname:
            return True
        # The second is about trees without a jax.Array, such as those of a conversion.
        return record.levelno == logging.WARNING and not str(record.msg).startswith("No jax.Array")


_QUIET = _QuietOrbax()


def quiet_orbax() -> None:
    """Keeps Orbax's progress chatter, and tracebacks that are raised as errors anyway, off the user's screen."""
    logger = logging.getLogger("absl")
    if _QUIET not in logger.filters:
        logger.addFilter(_QUIET)


class _IgnoreLateWrites(logging.Filter):
    """Keeps a traceback per array off the screen when a save fails.

    At the first write that fails Orbax raises and closes its event loop. The other writes then report, as late as at
    the program's end, to asyncio's logger, or find the loop closed and report to ``sys.unraisablehook``. The failure
    itself becomes a CheckpointError.
    """

    def __init__(self):
        super().__init__()
        self.previous = sys.unraisablehook

    def __call__(self, report) -> None:
        if not _is_late_write(report.exc_value):
            self.previous(report)

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info:
            return not _is_late_write(record.exc_info[1])
        message = record.getMessage()
        return not (message.startswith("Task was destroyed") and f"{os.sep}orbax{os.sep}" in message)


def _is_late_write(error: BaseException | None) -> bool:
    text = str(error)
    return text == "Event loop is closed" or ("Error writing" in text and TEMPORARY_MARK in text)


_LATE_WRITES: list[_IgnoreLateWrites] = []


def quiet_failed_writes() -> None:
    """Leaves one message of a save that fails: the error that is raised."""
    if not _LATE_WRITES:
        _LATE_WRITES.append(_IgnoreLateWrites())
        sys.unraisablehook = _LATE_WRITES[0]
        logging.getLogger("asyncio").addFilter(_LATE_WRITES[0])
        warnings.filterwarnings("ignore", "coroutine 'async_serialize", RuntimeWarning)
