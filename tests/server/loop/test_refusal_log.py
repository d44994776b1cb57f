"""refusal_log: what a user can cause without any right is noted at a limited rate, and counted."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import pytest

from fdshare.server.core.policy import Subject
from fdshare.server.core.ports import Session
from fdshare.server.core.users import User
from fdshare.server.loop.refusal_log import RefusalLog


class Keep(logging.Handler):
    """Adds messages to *lines*."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__()
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(record.getMessage())


class Log:
    """A RefusalLog, the lines that it caused, and what it wants to be called for."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.due: list[tuple[float, Callable[[float], None]]] = []
        self.refusals = RefusalLog(lambda delay, call: self.due.append((delay, call)))

    def refuse(self, uid: int, count: int, now: float) -> int:
        """How many lines so many refusals become."""
        before = len(self.lines)
        session = Session(Subject(uid, uid), 7, User(uid, False))
        for _ in range(count):
            self.refusals.note("fetch", "x", session, "refused", now)
        return len(self.lines) - before


@pytest.fixture
def log() -> Iterator[Log]:
    log, logger = Log(), logging.getLogger("fdshare.audit")
    handler = Keep(log.lines)
    former = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    yield log
    logger.removeHandler(handler)
    logger.setLevel(former)


def test_a_user_gets_a_burst_and_then_a_rate(log: Log) -> None:
    assert log.refuse(1, 1000, 0.0) == 100
    assert log.refuse(2, 3, 0.0) == 3  # another's are another's
    assert log.refuse(1, 1000, 0.05) == 0
    assert log.refuse(1, 1000, 0.2) == 2
    assert log.refuse(1, 1000, 3600.0) == 100
    assert set(log.lines) == {f"pid 7 uid {uid} fetch 'x': refused" for uid in (1, 2)}


def test_what_is_left_out_is_counted(log: Log) -> None:
    log.refuse(1, 150, 0.0)
    log.refuse(2, 1, 0.0)
    ((delay, call),) = log.due
    log.due.clear()
    del log.lines[:]
    call(delay)
    assert log.lines == ["uid 1 request '': refused 50 times more"]
    ((_, call),) = log.due  # for the burst of 1 is not yet full again
    log.due.clear()
    call(1.5 * delay)
    assert len(log.lines) == 1
    ((_, call),) = log.due
    log.due.clear()
    call(1000.0)
    assert not log.due
    log.refuse(1, 1, 1000.0)
    assert len(log.due) == 1
    log.refuse(1, 200, 1000.0)
    log.refusals.tell()  # the server ends
    assert log.lines[-1] == "uid 1 request '': refused 101 times more"
