"""run --detach: what the program has, and that it ends with who waits for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from commandline import FDSHARE, Shell
from ending import is_running

READY = """
import os, select, sys, fdshare
print("starts", file=sys.stderr, flush=True)
fdshare.notify("READY=1")
select.select([], [], [])
"""
# Tells its pid by a fifo, and is never ready. Its child is what a wrapper leaves behind.
SLOW = """
import os, select, signal, sys
open(sys.argv[1], "w").write(f"{os.getpid()} {os.fork() or os.getpid()}\\n")
select.select([], [], [])
"""
WORDS = ["run", "--notify", "--detach", "web=tcp://127.0.0.1:0"]


def links(pid: int) -> dict[str, str]:
    folder = f"/proc/{pid}/fd"
    return {number: os.readlink(f"{folder}/{number}") for number in os.listdir(folder)}


@pytest.fixture
def slow(folder: Path) -> tuple[list[str], Callable[[], list[int]]]:
    """A program that is never ready, and what waits for its pid and that of its child."""
    fifo = folder / "pids"
    os.mkfifo(fifo)

    def pids() -> list[int]:
        found = set()
        with open(fifo) as file:  # to its end: both have written
            for line in file:
                found |= set(map(int, line.split()))
        return sorted(found)

    return [sys.executable, "-c", SLOW, str(fifo)], pids


def test_it_returns_when_the_program_is_ready(fdshare: Shell) -> None:
    done = fdshare.run(*WORDS, "--", sys.executable, "-c", READY)
    assert done.returncode == 0
    pid = int(done.stdout)
    fdshare.adopt(pid)
    assert b"READY=1" in Path(f"/proc/{pid}/cmdline").read_bytes()
    log = f"{fdshare.path}.web.log"
    assert done.stderr == f"fdshare: web writes to {log}\n"
    assert Path(log).read_text() == "starts\n"
    found = links(pid)
    assert [found[number] for number in "012"] == ["/dev/null", log, log]
    assert found["3"].startswith("socket:")
    assert len(found) == 4


def test_nothing_keeps_what_the_caller_has(fdshare: Shell, folder: Path) -> None:
    """A captured deploy returns: `subprocess.run(capture_output=True)`, ssh, every CI."""
    reads, writes = os.pipe()  # as a lock that a script has, or the pipe of a CI
    with open(reads, "rb") as lock:
        done = subprocess.run(
            [*FDSHARE, *WORDS, "--output", str(folder / "out"), "--", sys.executable, "-c", READY],
            env=fdshare.environment,
            capture_output=True,
            pass_fds=[writes],
            timeout=60,
        )
        os.close(writes)
        fdshare.adopt(int(done.stdout))
        assert (done.returncode, done.stderr) == (0, b"")
        assert lock.read() == b""
    assert (folder / "out").read_text() == "starts\n"


def test_streams_of_the_server_need_no_file(fdshare: Shell, folder: Path) -> None:
    fdshare("register", "log", "--open", folder / "log", "--mode", "a")
    streams = ["--stdout", "log", "--stderr", "log"]
    done = fdshare.run(*WORDS, *streams, "--", sys.executable, "-c", READY)
    fdshare.adopt(int(done.stdout))
    assert done.stderr == ""
    assert (folder / "log").read_text() == "starts\n"
    assert not Path(f"{fdshare.path}.web.log").exists()


def test_it_tells_of_a_program_that_ended(fdshare: Shell) -> None:
    line = fdshare.fails(*WORDS, "--", "sh", "-c", "exit 3")
    assert line == "fdshare: the program ended with status 3 before it was ready"
    done = fdshare.run(*WORDS, "--", "sh", "-c", "echo \33[31mbad release >&2; exit 3")
    assert done.stderr.splitlines() == [
        f"fdshare: the last lines of {fdshare.path}.web.log:",
        "    \\x1b[31mbad release",
        "fdshare: the program ended with status 3 before it was ready",
    ]


def test_what_a_wrapper_leaves_is_ended(fdshare: Shell, folder: Path) -> None:
    """It would be on the listener, and nobody would know of it."""
    script = f"sleep 600 & echo $! >{folder}/pid; exit 0"
    done = fdshare.run(*WORDS, "--", "sh", "-c", script)
    assert done.returncode == 1
    assert "have it stay in the foreground" in done.stderr
    assert not is_running(int((folder / "pid").read_text()))


def test_a_program_that_cannot_be_executed(fdshare: Shell, folder: Path) -> None:
    program = folder / "plain"
    program.write_text("echo\n")
    program.chmod(0o755)
    done = fdshare.run(*WORDS, "--", program)
    assert done.returncode == 126
    assert "Exec format error" in done.stderr


def test_a_program_that_is_never_ready_ends_with_what_it_started(fdshare: Shell, slow) -> None:
    command, pids = slow
    process = fdshare.start(
        *WORDS, "--ready-timeout", "0.5", "--", *command, stderr=subprocess.PIPE
    )
    started = pids()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors == "fdshare: the program was not ready within 0.5 s, and is ended\n"
    assert not any(map(is_running, started))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("timeout", ["90", "inf", "3000000"])
def test_an_interrupted_start_leaves_no_program(
    fdshare: Shell, slow, number: signal.Signals, timeout: str
) -> None:
    command, pids = slow
    words = [*WORDS, "--ready-timeout", timeout, "--", *command]
    process = fdshare.start(*words, stderr=subprocess.PIPE)
    started = pids()
    process.send_signal(number)
    said, errors = process.communicate(timeout=60)
    assert (process.returncode, said) == (128 + number, "")
    assert errors == f"fdshare: {number.name} came: the program was not ready yet, and is ended\n"
    assert not any(map(is_running, started))


def test_a_start_that_is_killed_leaves_no_program(fdshare: Shell, slow, until) -> None:
    command, pids = slow
    process = fdshare.start(*WORDS, "--", *command)
    started = pids()
    process.kill()
    until(lambda: not any(map(is_running, started)), "the helper ends the program")


def test_a_start_whose_helper_is_killed_ends(fdshare: Shell, slow, fresh) -> None:
    """It waited for the end of the program, without a timeout, whatever signal came."""
    command, pids = slow
    process = fdshare.start(*WORDS, "--", *command, stderr=subprocess.PIPE)
    started = pids()
    os.kill(helper_of(process.pid), signal.SIGKILL)
    said, errors = process.communicate(timeout=60)
    assert (process.returncode, said) == (1, "")
    assert errors == (
        "fdshare: the program has lost the helper that hears its notifications, and is ended\n"
    )
    assert not any(map(is_running, started))


def helper_of(pid: int) -> int:
    """The other process with the command line of *pid*."""
    words = Path(f"/proc/{pid}/cmdline").read_bytes()
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            if Path(f"/proc/{name}/cmdline").read_bytes() == words and int(name) != pid:
                found.append(int(name))
    (helper,) = found
    return helper


def test_a_pid_that_nobody_can_read(fdshare: Shell) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*FDSHARE, *WORDS, "--", sys.executable, "-c", READY],
            env=fdshare.environment,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    assert done.returncode == 1
    assert "its pid cannot be written: No space left on device, and is ended" in done.stderr


@pytest.mark.parametrize("word", ["nan", "-1", "soon"])
def test_what_is_no_time(fdshare: Shell, word: str) -> None:
    line = fdshare.fails(*WORDS, "--ready-timeout", word, "--", "true", status=2)
    assert f"'{word}' is not a number of seconds" in line


def test_output_is_of_detached_programs(fdshare: Shell) -> None:
    assert "--detach" in fdshare.fails("run", "--output", "x", "web", "--", "true", status=2)
