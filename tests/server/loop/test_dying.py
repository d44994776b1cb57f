"""Processes that hang in their end: told from those that live, and reaped at last."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
from breaking import state
from conftest import wait_until
from hanging import HangingFileSystem, needs_fuse
from users import AsUser

from fdshare.kernel.descriptor import Descriptor
from fdshare.server.loop.dying import Dying, has_ended, is_ending, pid_of, reap
from fdshare.server.loop.poller import Poller
from server.full import limited


@pytest.fixture
def poller() -> Iterator[Poller]:
    poller = Poller()
    yield poller
    poller.close()


def test_what_a_pidfd_says() -> None:
    code = "import sys; sys.exit(len(sys.stdin.read()))"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
    assert process.stdin is not None
    with Descriptor(os.pidfd_open(process.pid)) as pidfd:
        assert pid_of(pidfd) == process.pid
        assert not has_ended(pidfd)
        assert not is_ending(pidfd)
        process.stdin.write(b"123")
        process.stdin.close()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert has_ended(pidfd)
        assert is_ending(pidfd)
        assert reap(pidfd) == "it ended with status 3"
        assert "no child of this process" in reap(pidfd)
        assert is_ending(pidfd)
        assert pid_of(pidfd) == -1
    process.returncode = 3


@needs_fuse
def test_one_that_hangs_is_known_until_it_has_ended(poller: Poller) -> None:
    known: dict[int, str] = {}
    dying = Dying(poller, known)
    files = HangingFileSystem(0)

    with AsUser(0, files.hold, file_system=files) as process:
        assert process.hear() == "holds it"
        pidfd = Descriptor(os.pidfd_open(process.pid))
        assert not is_ending(pidfd)
        os.kill(process.pid, signal.SIGKILL)
        wait_until(lambda: is_ending(pidfd))
        assert not has_ended(pidfd)
        dying.bury(pidfd, "server")
        assert known == {process.pid: "server"}
        assert "it was the server and hangs" in dying.notes()[f"pid {process.pid}"]
        # As after an exec, or in a forked process: only the pids are known.
        other = Poller()
        again = Dying(other, known.copy())
        assert again.notes() == dying.notes()
        again.close()
        other.close()
        files.close()
        wait_until(lambda: state(process.pid) == "Z")
        for key, events in poller.wait(20):
            key(events)  # type: ignore[operator]
        assert known == dying.notes() == {}
        with pytest.raises(ChildProcessError):  # it is reaped
            os.waitpid(process.pid, os.WNOHANG)


def test_one_that_has_ended_is_reaped_at_once(poller: Poller) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    pidfd = Descriptor(os.pidfd_open(process.pid))
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    dying = Dying(poller, {process.pid: "keeper"})
    assert dying.notes() == {}
    dying.bury(pidfd, "keeper")
    assert dying.notes() == {}
    assert pidfd.closed
    process.returncode = 0


def test_one_that_has_ended_is_reaped_without_a_free_descriptor(poller: Poller) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    pidfd = Descriptor(os.pidfd_open(process.pid))
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    dying = Dying(poller, {})
    with limited(os.getpid(), 0):
        dying.bury(pidfd, "keeper")
    assert pidfd.closed
    with pytest.raises(ChildProcessError):
        os.waitpid(process.pid, os.WNOHANG)
    process.returncode = 0


def test_one_that_hangs_is_watched_when_a_descriptor_is_free(poller: Poller) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert process.stdin is not None
    pidfd = Descriptor(os.pidfd_open(process.pid))
    known = {process.pid: "keeper"}
    with limited(os.getpid(), 0):
        dying = Dying(poller, known)
        unknown = Dying(poller, {})
        unknown.bury(pidfd, "keeper")
    assert unknown.notes() == {}
    assert list(dying.notes()) == [f"pid {process.pid}"]
    process.stdin.write(b"\n")
    process.stdin.close()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    for key, events in poller.wait(20):  # both watch it
        key(events)  # type: ignore[operator]
    assert known == dying.notes() == {}
    assert pidfd.closed
    process.returncode = 0
