"""logs: lines that people, and programs, can read."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from typing import Literal

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


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_the_journal_is_told_priorities(
    log_format: Literal["text", "json"],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    info = os.fstat(sys.stderr.fileno())
    monkeypatch.setenv("JOURNAL_STREAM", f"{info.st_dev}:{info.st_ino}")
    logs.configure(Settings(path="", log_level="DEBUG", log_format=log_format))
    for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR, logging.CRITICAL):
        log.log(level, "first\n<0>second")
    lines = capfd.readouterr().err.splitlines()
    if log_format == "text":
        assert lines[:4] == ["<7>first", "<7><0>second", "<6>first", "<6><0>second"]
        lines = lines[::2]
    assert [line[:3] for line in lines] == ["<7>", "<6>", "<4>", "<3>", "<2>"]


def test_another_stream_is_not_the_journal(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JOURNAL_STREAM", "1:2")
    logs.configure(Settings(path=""))
    log.info("here")
    assert capfd.readouterr().err == f"fdshare[{os.getpid()}] INFO: here\n"
