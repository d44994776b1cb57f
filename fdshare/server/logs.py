"""The server's log, on standard error: text or JSON lines."""

from __future__ import annotations

import logging
import sys
from typing import Any

import msgspec

from fdshare.server.settings import Settings

__all__ = ["configure"]

_EXTRA = ("verb", "entry", "outcome", "pid", "uid")  # what the audit log adds to a record


def configure(settings: Settings) -> None:
    """Makes the loggers of the server write to standard error. To be called in each process."""
    handler = logging.StreamHandler(sys.stderr)
    if settings.log_format == "json":
        handler.setFormatter(_JsonLines())
    else:
        handler.setFormatter(logging.Formatter("fdshare[%(process)d] %(levelname)s: %(message)s"))
    logger = logging.getLogger("fdshare")
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(settings.log_level)


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
