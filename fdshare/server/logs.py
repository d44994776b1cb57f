"""The server's log, on standard error: text or JSON lines, in the journal with priorities.

docs/audit.md has the form of the lines. Nobody waits for them (log_writer.py), and no text of a
peer's is in them as it came.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import sys
import time
from collections.abc import Mapping
from functools import partial
from typing import Final, NamedTuple, TypeAlias, TypeVar

import msgspec

from fdshare.printable import printable, printable_json
from fdshare.server.log_writer import LogWriter
from fdshare.server.settings import Settings

__all__ = [
    "audit",
    "configure",
    "dropped",
    "failure",
    "flush",
    "is_full",
    "rest",
    "resume",
]

T = TypeVar("T")

_STDERR: Final = 2
_PATIENCE: Final = 0.5  # seconds for the last lines of a process
_PRIORITIES: Final = {
    "DEBUG": 7,
    "INFO": 6,
    "WARNING": 4,
    "ERROR": 3,
    "CRITICAL": 2,
}
# What a line takes in memory while it waits: so many bytes, and so many for each character.
_OVERHEAD: Final = 250
_WIDEST: Final = 4
# Characters: what is longer is cut, so that a line of whatever a peer sends is short.
_MOST_OF_NAME: Final = 300
_MOST_OF_OUTCOME: Final = 600
_MOST_OF_MESSAGE: Final = 2000
_MOST_OF_TRACEBACK: Final = 10_000
_KNOWN: Final = 1 << 21  # bytes of audit lines that are remembered,
_KNOWN_OF_ONE: Final = 1 << 16  # and of the lines of one event
_LOST: Final = "of the log are lost: they were not read in time, or could not be written"


class _Line(NamedTuple):
    """What becomes one line, or one and its traceback."""

    time: float
    level: str
    logger: str
    message: str
    traceback: str = ""


class _Audited(NamedTuple):
    """What an audit line says, or several lines about the entries of one request. *pid* is None if
    it is not about one process, *uid* is None if no client asked for it."""

    verb: str
    entry: str | tuple[str, ...]
    outcome: str
    pid: int | None
    uid: int | None

    def each(self) -> list[_Audited]:
        """What one line says each."""
        if isinstance(self.entry, str):
            return [self]
        return [self._replace(entry=entry) for entry in self.entry]

    def message(self) -> str:
        pid = "" if self.pid is None else f"pid {self.pid} "
        uid = "" if self.uid is None else f"uid {self.uid} "
        return f"{pid}{uid}{self.verb} {self.entry!r}: {self.outcome}"


# It waits as a plain tuple, which costs less, with its time.
_What: TypeAlias = "tuple[str, str | tuple[str, ...], str, int | None, int | None]"
_Item: TypeAlias = "_Line | tuple[float, _What]"

# Lines that this process has written, by what they say: the same client often fetches the same
# names. Only of text, where no time is in them.
_ready: dict[_What, bytes] = {}
_writer: LogWriter[_Item] | None = None
_audit_log = logging.getLogger("fdshare.audit")


def configure(settings: Settings) -> None:
    """Makes the loggers of the server write to standard error. To be called in each process that
    was not forked by one that did."""
    global _writer
    logger = logging.getLogger("fdshare")
    logger.propagate = False
    logger.setLevel(settings.log_level)
    if _writer is not None:
        _writer.flush(_PATIENCE)
        _writer.rest()
        _writer = None
    if not _has_stderr():
        logger.handlers[:] = [logging.NullHandler()]
        return
    form = _JsonLines if settings.log_format == "json" else _TextLines
    _writer = LogWriter(_STDERR, partial(form, _is_journal()))
    _writer.resume()
    logger.handlers[:] = [_Handler(_writer)]
    atexit.unregister(flush)
    atexit.register(flush)


def audit(
    verb: str,
    entry: str | tuple[str, ...],
    outcome: str,
    pid: int | None = None,
    uid: int | None = None,
) -> None:
    """Notes who was given or refused what; a line for each *entry*. The lines are put together
    later, by another thread."""
    what = (verb, entry, outcome, pid, uid)
    if _writer is None:
        for one in _Audited(*what).each():
            _audit_log.info("%s", one.message())
        return
    count = 1 if isinstance(entry, str) else len(entry)
    lines = _ready.get(what)
    if lines is not None:
        _writer.put(lines, _OVERHEAD * count, count)
        return
    outcome = _shortened(outcome, _MOST_OF_OUTCOME)
    if isinstance(entry, str):
        entry = _shortened(entry, _MOST_OF_NAME)
    length = len(entry) if isinstance(entry, str) else sum(map(len, entry))
    size = (_OVERHEAD + _WIDEST * len(outcome)) * count + _WIDEST * length
    _writer.put((time.time(), (verb, entry, outcome, pid, uid)), size, count)


def is_full() -> bool:
    """True if there may be no room for all that one request is noted with."""
    return _writer is not None and _writer.full


def dropped() -> int:
    """How many lines this process had no room for."""
    return 0 if _writer is None else _writer.dropped


def failure() -> str:
    """Why the log cannot be written now; empty if it can, as far as is known."""
    return "" if _writer is None else _writer.failure


def flush(seconds: float = _PATIENCE) -> None:
    """Waits for what was logged to be written, *seconds* at most. To be called before the end of a
    process that os._exit() or exec(2) makes."""
    if _writer is not None:
        _writer.flush(seconds)


def rest() -> None:
    """Ends the thread that writes. To be called before a fork."""
    if _writer is not None:
        _writer.rest()


def resume() -> None:
    """Starts it again; after a fork in both processes."""
    if _writer is not None:
        _writer.resume()


def _shortened(text: str, most: int) -> str:
    """*text*, or its start."""
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"


def _has_stderr() -> bool:
    """False if it was closed at the start: its number may be that of anything since."""
    try:
        os.fstat(_STDERR)
    except OSError:
        return False
    return sys.__stderr__ is not None


def _is_journal() -> bool:
    """Whether standard error is the journal's stream, systemd.exec(5)."""
    device, _, inode = os.environ.get("JOURNAL_STREAM", "").partition(":")
    info = os.fstat(_STDERR)
    return (device, inode) == (str(info.st_dev), str(info.st_ino))


class _Handler(logging.Handler):
    """Passes what the loggers are told to the writer."""

    def __init__(self, writer: LogWriter[_Item]) -> None:
        super().__init__()
        self._writer = writer
        self._formatter = logging.Formatter()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            message = record.getMessage()
            traceback = self._formatter.formatException(record.exc_info) if record.exc_info else ""
        except Exception as error:
            message, traceback = f"{record.msg!r}: {error!r}", ""
        message = _shortened(message, _MOST_OF_MESSAGE)
        traceback = traceback[-_MOST_OF_TRACEBACK:]
        line = _Line(record.created, record.levelname, record.name, message, traceback)
        self._writer.put(line, _OVERHEAD + _WIDEST * (len(message) + len(traceback)))


class _Lines:
    """The form of the lines of this process."""

    def __init__(self, of_journal: bool) -> None:
        self._of_journal = of_journal
        self._process = os.getpid()
        _ready.clear()  # they have another form, or the pid of another process
        self._known = 0  # bytes of lines that are remembered

    def render(self, item: _Item) -> bytes:
        if type(item) is _Line:
            prefix = self._prefix(item.level)
            return "".join(f"{prefix}{line}\n" for line in self._lines(item)).encode()
        return self._audited(*item)

    def lost(self, count: int) -> bytes:
        return self.render(
            _Line(time.time(), "WARNING", "fdshare.server", f"{count} lines {_LOST}")
        )

    def _prefix(self, level: str) -> str:
        return f"<{_PRIORITIES.get(level, 6)}>" if self._of_journal else ""

    def _remember(self, known: dict[_What, T], what: _What, lines: T, size: int) -> None:
        """Has *known* say what the *lines* of *what* are, which have *size* bytes."""
        if size > _KNOWN_OF_ONE:
            return
        size += _OVERHEAD
        if self._known + size > _KNOWN:
            known.clear()
            self._known = 0
        known[what] = lines
        self._known += size

    def _lines(self, line: _Line) -> list[str]:
        """The lines that it becomes, without prefixes and ends."""
        raise NotImplementedError

    def _audited(self, time: float, what: _What) -> bytes:
        """The line of an audited event, whole."""
        raise NotImplementedError


class _TextLines(_Lines):
    def _lines(self, line: _Line) -> list[str]:
        lines = [self._start(line.level) + printable(line.message)]
        if line.traceback:
            # Behind spaces no line begins as the log's own do, whatever is in the exception.
            lines += [f"    {printable(part)}" for part in line.traceback.split("\n")]
        return lines

    def _audited(self, time: float, what: _What) -> bytes:
        start = self._prefix("INFO") + self._start("INFO")
        all = [f"{start}{printable(one.message())}\n" for one in _Audited(*what).each()]
        lines = "".join(all).encode()
        self._remember(_ready, what, lines, len(lines))
        return lines

    def _start(self, level: str) -> str:
        return "" if self._of_journal else f"fdshare[{self._process}] {level}: "


class _JsonLines(_Lines):
    def __init__(self, of_journal: bool) -> None:
        super().__init__(of_journal)
        self._info = self._prefix("INFO").encode()
        self._ends: dict[_What, list[bytes]] = {}  # of the lines of an event, after the time

    def _lines(self, line: _Line) -> list[str]:
        more = {"exception": line.traceback} if line.traceback else {}
        end = self._end(line.level.lower(), line.logger, line.message, more)
        return [f'{{"time":{line.time!r},{end}']

    def _audited(self, time: float, what: _What) -> bytes:
        ends = self._ends.get(what)
        if ends is None:
            ends = [f"{self._end_of(one)}\n".encode() for one in _Audited(*what).each()]
            self._remember(self._ends, what, ends, sum(map(len, ends)))
        start = b'%b{"time":%r,' % (self._info, time)
        return start + start.join(ends)

    def _end_of(self, one: _Audited) -> str:
        more = {field: value for field, value in one._asdict().items() if value is not None}
        return self._end("info", "fdshare.audit", one.message(), more)

    def _end(self, level: str, logger: str, message: str, more: Mapping[str, object]) -> str:
        """All of a line but the time, which is the first field."""
        fields = {"level": level, "logger": logger, "process": self._process, "message": message}
        return printable_json(_json({**fields, **more}))[1:]


_encode = msgspec.json.Encoder().encode


def _json(line: dict[str, object]) -> str:
    try:
        return _encode(line).decode()
    except UnicodeEncodeError:  # there is half of a surrogate pair in it
        return json.dumps(line)
