"""The server's log, on standard error: text or JSON lines, in the journal with priorities."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any, Final

import msgspec

from fdshare.server.settings import Settings

__all__ = ["configure"]

_PRIORITIES: Final = {
    logging.DEBUG: 7,
    logging.INFO: 6,
    logging.WARNING: 4,
    logging.ERROR: 3,
    logging.CRITICAL: 2,
}
_EXTRA = ("verb", "entry", "outcome", "pid", "uid")  # what the audit log adds to a record


def configure(settings: Settings) -> None:
    """Makes the loggers of the server write to standard error. To be called in each process."""
    handler = logging.StreamHandler(sys.stderr)
    of_journal = _is_journal()
    formatter: logging.Formatter
    if settings.log_format == "json":
        formatter = _JsonLines()
    elif of_journal:  # which knows the rest
        formatter = logging.Formatter("%(message)s")
    else:
        formatter = logging.Formatter("fdshare[%(process)d] %(levelname)s: %(message)s")
    handler.setFormatter(_Prioritized(formatter) if of_journal else formatter)
    logger = logging.getLogger("fdshare")
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(settings.log_level)


def _is_journal() -> bool:
    """Whether standard error is the journal's stream, systemd.exec(5)."""
    device, _, inode = os.environ.get("JOURNAL_STREAM", "").partition(":")
    try:
        info = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):  # closed, or no file at all
        return False
    return (device, inode) == (str(info.st_dev), str(info.st_ino))


class _Prioritized(logging.Formatter):
    """Each line as *formatter* has it, behind its priority (sd-daemon(3), SD_ERR and others)."""

    def __init__(self, formatter: logging.Formatter) -> None:
        super().__init__()
        self._formatter = formatter

    def format(self, record: logging.LogRecord) -> str:
        prefix = f"<{_PRIORITIES.get(record.levelno, 6)}>"
        return "\n".join(prefix + line for line in self._formatter.format(record).split("\n"))


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": record.created,
            "level": record.levelname.lower(),
            "logger": record.name,
            "process": record.process,
            "message": record.getMessage(),
        }
        given = vars(record)
        line.update((key, given[key]) for key in _EXTRA if given.get(key) is not None)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()
