"""processes: a fence, a fork, and lives that follow one another."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
from breaking import ended
from conftest import census
from hanging import HangingFileSystem, needs_fuse
from users import AsUser

from fdshare.kernel.descriptor import Descriptor
from fdshare.server.failover.processes import SIGNALS, Deaths, Life, fence, fork_half, live
from fdshare.server.loop.dying import has_ended
from fdshare.server.loop.lanes import Lanes

# Deaths.


def test_five_deaths_in_ten_seconds_are_too_many() -> None:
    deaths = Deaths()
    assert [deaths.too_many(now) for now in (0.0, 1.0, 2.0, 9.9)] == [""] * 4
    assert deaths.too_many(9.99) == "5 times in 10 s"
    assert [deaths.too_many(now) for now in (10.0, 10.1, 10.2, 10.3)] == [""] * 4  # counted anew


def test_five_deaths_in_a_longer_time_are_not() -> None:
    deaths = Deaths()
    assert [deaths.too_many(2.5 * n) for n in range(100)] == [""] * 100
    assert deaths.too_many(247.6) == "5 times in 10 s"  # those of 240, 242.5, 245 and 247.5 are


# The fence.


@pytest.mark.parametrize(
    ("code", "how"),
    [
        ("input()", "it was killed by signal 9"),
        ("raise SystemExit(3)", "it ended with status 3"),
        ("import os; os.kill(os.getpid(), 15)", "it was killed by signal 15"),
    ],
)
def test_a_fence_is_the_end_and_says_how_it_came(code: str, how: str) -> None:
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with process, Descriptor(os.pidfd_open(process.pid)) as pidfd, near, far:
        if "input" not in code:
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it has ended by itself
        far.send(b"before")
        assert fence(pidfd, near) == how
        assert ended(process.pid)
        assert has_ended(pidfd)
        # What was written is there, and nothing comes after it.
        with pytest.raises(BrokenPipeError):
            far.send(b"after")
        assert [near.recv(10), near.recv(10)] == [b"before", b""]
        process.returncode = 0  # the fence has its status


def test_a_fence_for_no_child_of_ours() -> None:
    code = """if True:
        import subprocess, sys
        grandchild = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"])
        print(grandchild.pid, flush=True)
        grandchild.wait()
    """
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:  # type: ignore[call-overload]
        pid = int(process.stdout.readline())
        with Descriptor(os.pidfd_open(pid)) as pidfd, socket.socket(socket.AF_UNIX) as journal:
            assert "it was no child of this process" in fence(pidfd, journal)
            assert ended(pid)


@needs_fuse
def test_a_process_that_hangs_in_its_end_is_not_waited_for() -> None:
    """It is killed, and its file system does not answer: its pidfd never says so."""
    files = HangingFileSystem(0)

    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with AsUser(0, files.hold, file_system=files) as process, near, far:
        assert process.hear() == "holds it"
        with Descriptor(os.pidfd_open(process.pid)) as pidfd:
            assert "hangs in its end" in fence(pidfd, near)
            assert not has_ended(pidfd)
            with pytest.raises(BrokenPipeError):
                far.send(b"after")
            files.close()
            assert has_ended(pidfd, 20)


# Fork.


def test_both_halves_have_one_end_and_know_each_other() -> None:
    lanes = Lanes()
    me, before = os.getpid(), census()
    half = fork_half(lanes)
    if half.born:
        try:
            with open(f"/proc/self/fdinfo/{half.other.fileno()}") as info:
                assert f"Pid:\t{me}\n" in info.read()
            assert half.pid == me
            # Nothing is open twice: the end of the parent would never be seen otherwise. (What
            # multiprocessing has open, from Python 3.14 on it closes after a fork.)
            assert len(census().items() - before.items()) == 2
            half.journal.send(b"born")
            half.journal.recv(1)
            os._exit(0)
        finally:
            os._exit(1)
    assert half.journal.recv(10) == b"born"
    assert len(census()) == len(before) + 2
    half.journal.close()
    child = os.waitid(os.P_PIDFD, half.other.fileno(), os.WEXITED)
    assert child is not None
    assert (child.si_pid, child.si_status) == (half.pid, 0)
    half.other.close()
    lanes.rest()


def test_a_child_hears_no_signal_before_it_has_its_handlers() -> None:
    lanes = Lanes()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    half = fork_half(lanes)
    if half.born:
        half.journal.send(" ".join(map(str, signal.pthread_sigmask(signal.SIG_BLOCK, ()))).encode())
        os._exit(0)
    blocked = set(map(int, half.journal.recv(1000).split()))
    assert blocked == before | set(SIGNALS)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
    fence(half.other, half.journal)
    half.journal.close()
    half.other.close()
    lanes.rest()


def test_a_thread_that_is_left_is_no_warning() -> None:
    lanes, end = Lanes(), threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            half = fork_half(lanes)
        if half.born:
            os._exit(0)
    finally:
        end.set()
        thread.join()
    fence(half.other, half.journal)
    half.journal.close()
    half.other.close()
    lanes.rest()
    assert said == []


def children() -> str:
    return Path("/proc/thread-self/children").read_text()


def test_an_orphan_is_no_child_of_its_other_half() -> None:
    lanes = Lanes()
    me, before, known = os.getpid(), census(), children()
    half = fork_half(lanes, orphan=True)
    if half.born:
        half.journal.send(f"{os.getpid()} {half.pid} {os.getppid()}".encode())
        half.journal.recv(1)
        os._exit(0)
    pid, other, parent = map(int, half.journal.recv(100).split())
    assert (pid, other) == (half.pid, me)
    assert parent != me
    assert children() == known  # nor is the process between them left
    assert len(census()) == len(before) + 2
    assert "it was no child of this process" in fence(half.other, half.journal)
    half.journal.close()
    half.other.close()
    lanes.rest()


# Lives.


def test_lives_follow_one_another_and_return_to_the_caller() -> None:
    lived = []

    def life(number: int) -> Life:
        def run() -> Life | None:
            lived.append(number)
            return life(number + 1) if number < 3 else None

        return run

    live(life(1))
    assert lived == [1, 2, 3]


def test_what_goes_wrong_is_raised_to_the_caller() -> None:
    def life() -> None:
        raise ValueError("here")

    with pytest.raises(ValueError, match="here"):
        live(life)


@pytest.mark.parametrize(("fails", "status"), [(False, 0), (True, 1)])
def test_a_forked_life_ends_its_process(fails: bool, status: int) -> None:
    """The stack that it came from is the parent's; of an error, the log has the traceback."""
    near, far = socket.socketpair()
    me = os.getpid()
    pids = []

    def fork() -> Life | None:
        pid = os.fork()
        pids.append(pid)
        return child if not pid else None

    def child() -> None:
        far.send(b"lives")
        if fails:
            raise ValueError("there")

    live(fork)
    if os.getpid() != me:  # it has returned: to where the parent is
        far.send(b"returned")
        os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(pids[0], 0)[1]) == status
    assert near.recv(100) == b"lives"
    near.close()
    far.close()
