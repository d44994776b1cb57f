"""logs: lines that people, and programs, can read."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Literal

import pytest

from fdshare.server import logs
from fdshare.server.settings import Settings

log = logging.getLogger("fdshare.server")
HOSTILE = "\x1b]0;t\x07\x1b[31m\nfdshare[1] INFO: forged\r\x7f\x85\u2028\u202e\ud800"


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """The loggers, after the test."""
    logger = logging.getLogger("fdshare")
    handlers, level, propagate = logger.handlers[:], logger.level, logger.propagate
    yield
    logs.rest()
    logs._writer = None
    logger.handlers[:], logger.propagate = handlers, propagate
    logger.setLevel(level)


@pytest.fixture
def said(capfd: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """What was written to standard error since it was called last."""

    def said() -> str:
        logs.flush(20)
        return capfd.readouterr().err

    return said


Said = Callable[[], str]


def test_a_line_of_text_says_which_process(said: Said) -> None:
    logs.configure(Settings(path="", log_level="WARNING"))
    log.info("not worth a line")
    log.warning("the keeper is gone")
    assert said() == f"fdshare[{os.getpid()}] WARNING: the keeper is gone\n"


def test_a_second_process_does_not_log_twice(said: Said) -> None:
    for _ in range(2):
        logs.configure(Settings(path=""))
    log.info("once")
    assert said().count("once") == 1


def test_a_line_of_json(said: Said) -> None:
    logs.configure(Settings(path="", log_format="json"))
    log.info("of %s", "it")
    try:
        raise ValueError("a\nb")
    except ValueError:
        log.exception("it failed")
    first, second = map(json.loads, said().splitlines())
    assert 0 < first.pop("time") < second.pop("time") + 1
    assert first == {
        "level": "info",
        "logger": "fdshare.server",
        "process": os.getpid(),
        "message": "of it",
    }
    assert second["message"] == "it failed"
    assert second["exception"].endswith("ValueError: a\nb")


def test_what_is_audited(said: Said) -> None:
    logs.configure(Settings(path=""))
    logs.audit("take", "a", "returned")
    logs.audit("fetch", "b", "given", 0, 1000)
    me = f"fdshare[{os.getpid()}] INFO: "
    assert said() == f"{me}take 'a': returned\n{me}pid 0 uid 1000 fetch 'b': given\n"
    logs.configure(Settings(path="", log_format="json"))
    logs.audit("take", "a", "returned")
    logs.audit("fetch", "b", "given", 0, 1000)
    first, second = map(json.loads, said().splitlines())
    assert first.pop("time") <= second.pop("time")
    common = {"level": "info", "logger": "fdshare.audit", "process": os.getpid()}
    what = {"verb": "take", "entry": "a", "outcome": "returned"}
    assert first == {**common, **what, "message": "take 'a': returned"}
    what = {"verb": "fetch", "entry": "b", "outcome": "given"}
    message = "pid 0 uid 1000 fetch 'b': given"
    assert second == {**common, **what, "message": message, "pid": 0, "uid": 1000}


def test_what_is_audited_again_is_of_this_process_and_this_form(said: Said) -> None:
    for log_format in ("text", "json", "text"):
        logs.configure(Settings(path="", log_format=log_format))  # type: ignore[arg-type]
        logs.audit("fetch", "b", "given", 1, 2)
        first = said()
        assert str(os.getpid()) in first
        assert first.startswith("{") == (log_format == "json")
        logs.audit("fetch", "b", "given", 1, 2)
        second = said()
        if log_format == "text":
            assert second == first
        else:
            assert json.loads(second)["time"] > json.loads(first)["time"]
    logs.rest()
    child = os.fork()
    if not child:
        try:
            logs.resume()
            logs.audit("fetch", "b", "given", 1, 2)
            logs.flush(20)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    logs.resume()
    assert said().startswith(f"fdshare[{child}] ")


def test_few_lines_are_remembered(said: Said) -> None:
    """Each registration has a line of its own; an event may have many long ones."""
    logs.configure(Settings(path=""))
    for number in range(20_000):
        logs.audit("register", "a", f"generation {number}", 1, 2)
    many = tuple(f"{number}/{'x' * 240}" for number in range(253))
    logs.audit("fetch", many, "given", 1, 2)
    assert said().count("\n") == 20_253
    assert 1000 < len(logs._ready) < 8000
    assert all(what[1] == "a" for what in logs._ready)


def test_what_is_too_long_is_cut(said: Said) -> None:
    logs.configure(Settings(path=""))
    logs.audit("fetch", "n" * 1000, "o" * 1000)
    log.info("%s", "x" * 10_000)
    first, second = said().splitlines()
    assert first.endswith(f"'{'n' * 300}... (1000 characters)': {'o' * 600}... (1000 characters)")
    assert second.endswith(f": {'x' * 2000}... (10000 characters)")


@pytest.mark.parametrize("log_format", ["text", "json"])
@pytest.mark.parametrize("of_journal", [True, False])
def test_no_text_of_others_is_written_as_it_came(
    log_format: Literal["text", "json"],
    of_journal: bool,
    said: Said,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No line has a control character, and each that begins as the log's own do is one."""
    if of_journal:
        monkeypatch.setenv("JOURNAL_STREAM", stream())
    logs.configure(Settings(path="", log_format=log_format))

    log.info("a %s", HOSTILE)
    log.info("%d", HOSTILE)
    logs.audit(HOSTILE, HOSTILE, HOSTILE, 1, 1)
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        log.exception("%s", HOSTILE)
    lines = said().splitlines()
    assert all(line.isprintable() for line in lines)
    if of_journal:
        assert all(line.startswith(("<6>", "<3>")) for line in lines)
        lines = [line[3:] for line in lines]
    if log_format == "json":
        assert [json.loads(line)["process"] for line in lines] == [os.getpid()] * 4
    elif not of_journal:
        ours = [line for line in lines if not line.startswith("    ")]
        assert [line.partition(" ")[0] for line in ours] == [f"fdshare[{os.getpid()}]"] * 4


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_the_journal_is_told_priorities(
    log_format: Literal["text", "json"], said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JOURNAL_STREAM", stream())
    logs.configure(Settings(path="", log_level="DEBUG", log_format=log_format))
    for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR, logging.CRITICAL):
        log.log(level, "first\n<0>second")
    lines = said().splitlines()
    if log_format == "text":
        assert lines[:2] == [r"<7>first\n<0>second", r"<6>first\n<0>second"]
    assert [line[:3] for line in lines] == ["<7>", "<6>", "<4>", "<3>", "<2>"]


def test_another_stream_is_not_the_journal(said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOURNAL_STREAM", "1:2")
    logs.configure(Settings(path=""))
    log.info("here")
    assert said() == f"fdshare[{os.getpid()}] INFO: here\n"


def test_a_process_without_standard_error_writes_nowhere() -> None:
    """Its number is that of anything that was opened since."""
    code = """if True:
        import logging, os
        from fdshare.server import logs
        from fdshare.server.settings import Settings
        fd = os.memfd_create("other")
        os.dup2(fd, 2)
        logs.configure(Settings(path=""))
        logging.getLogger("fdshare.server").error("lost")
        logs.audit("fetch", "a", "given", 1, 1)
        logs.flush()
        print(os.fstat(2).st_size, logs.dropped())
    """
    command = ["sh", "-c", 'exec "$@" 2>&-', "sh", sys.executable, "-c", code]
    assert subprocess.check_output(command) == b"0 0\n"


def stream() -> str:
    """What JOURNAL_STREAM says if standard error is the journal's."""
    info = os.fstat(2)
    return f"{info.st_dev}:{info.st_ino}"
