"""logs: lines that people, and programs, can read."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator

import pytest

from fdshare.server import logs
from fdshare.server.settings import Settings

log = logging.getLogger("fdshare.server")


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """The loggers, after the test."""
    logger = logging.getLogger("fdshare")
    handlers, level, propagate = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.propagate = handlers, propagate
    logger.setLevel(level)


def test_a_line_of_text_says_which_process(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(Settings(path="", log_level="WARNING"))
    log.info("not worth a line")
    log.warning("the keeper is gone")
    assert capsys.readouterr().err == f"fdshare[{os.getpid()}] WARNING: the keeper is gone\n"


def test_a_second_process_does_not_log_twice(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        logs.configure(Settings(path=""))
    log.info("once")
    assert capsys.readouterr().err.count("once") == 1


def test_a_line_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(Settings(path="", log_format="json"))
    log.info("of %s", "it", extra={"verb": "take", "entry": "a", "pid": 0, "uid": None, "x": 1})
    try:
        raise ValueError("a\nb")
    except ValueError:
        log.exception("it failed")
    first, second = map(json.loads, capsys.readouterr().err.splitlines())
    assert 0 < first.pop("time") < second.pop("time") + 1
    assert first == {
        "level": "info",
        "logger": "fdshare.server",
        "process": os.getpid(),
        "message": "of it",
        "verb": "take",
        "entry": "a",
        "pid": 0,
    }
    assert second["message"] == "it failed"
    assert second["exception"].endswith("ValueError: a\nb")
