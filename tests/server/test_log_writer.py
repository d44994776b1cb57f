"""A writer of lines: in order, bounded, and nobody waits for it."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import threading
from collections.abc import Callable, Iterator

import pytest
from conftest import wait_until

from fdshare.server.log_writer import LogWriter

Make = Callable[..., LogWriter[str]]


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    read, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
    yield read, write
    os.close(read)
    os.close(write)


class AsItIs:
    """Lines that are written as they are given, as text or bytes."""

    def render(self, item: str) -> bytes:
        if item == "bad":
            raise ValueError("a\nb")
        return item.encode()

    def lost(self, count: int) -> bytes:
        return b"%d lost\n" % count


@pytest.fixture
def make() -> Iterator[Make]:
    """Makes a LogWriter, whose thread ends with the test."""
    made: list[LogWriter[str]] = []

    def make(fd: int, room: int = 1 << 20) -> LogWriter[str]:
        made.append(LogWriter(fd, AsItIs, room))
        return made[-1]

    yield make
    for writer in made:
        writer.rest()


def put(writer: LogWriter[str], *lines: bytes) -> None:
    for line in lines:
        writer.put(line, len(line))


def drain(fd: int) -> bytes:
    """What is in the pipe now."""
    os.set_blocking(fd, False)
    try:
        return os.read(fd, 1 << 20)
    except BlockingIOError:
        return b""


def test_its_thread_leaves_signals_to_the_main_thread(pipe: tuple[int, int]) -> None:
    class Blocked(AsItIs):
        def render(self, item: str) -> bytes:
            return b"%d" % (signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, ()))

    writer = LogWriter(pipe[1], Blocked)
    writer.put("line", 4)
    writer.flush(20)
    writer.rest()
    assert os.read(pipe[0], 99) == b"1"


def test_lines_are_written_in_order(pipe: tuple[int, int], make: Make) -> None:
    writer = make(pipe[1])
    put(writer, b"one\n", b"two\n")
    writer.flush(20)
    put(writer, b"three\n")
    writer.flush(20)
    assert os.read(pipe[0], 99) == b"one\ntwo\nthree\n"
    assert writer.dropped == 0
    assert not writer.full


def test_nobody_waits_where_nobody_reads(pipe: tuple[int, int], make: Make) -> None:
    """What has no room is dropped and counted, and one line says so when there is room."""
    writer = make(pipe[1], room=10_000)
    line = b"x" * 99 + b"\n"
    for _ in range(1000):  # one write hangs, and does not count as done
        put(writer, line)
    assert writer.full
    dropped = writer.dropped
    assert 1000 - 2 * 140 <= dropped <= 1000 - 100
    told = b"%d lost\n" % dropped
    got = b""

    def read_all() -> bool:
        nonlocal got
        got += drain(pipe[0])
        return len(got) == 100 * (1000 - dropped) + len(told)

    wait_until(read_all)
    assert got.count(told) == 1
    assert got.replace(told, b"") == line * (1000 - dropped)
    put(writer, line)
    writer.flush(20)
    assert os.read(pipe[0], 4096) == line
    assert writer.dropped == dropped


def test_what_cannot_be_written_is_written_later(make: Make) -> None:
    """A full disk: the lines wait as if nobody read them."""
    full = os.open("/dev/full", os.O_WRONLY)
    writer = make(full, room=10)
    put(writer, b"one\n", b"two\n", b"three\n")
    wait_until(lambda: writer.failure)
    writer.flush(1000)  # returns at once
    assert writer.failure == os.strerror(errno.ENOSPC)
    assert writer.dropped == 1
    read, write = os.pipe()
    os.dup2(write, full)
    os.close(write)
    got = b""

    def read_all() -> bool:
        nonlocal got
        got += drain(read)
        return sorted(got.splitlines()) == [b"1 lost", b"one", b"two"]

    wait_until(read_all)
    assert not writer.failure
    os.close(read)
    put(writer, b"four\n")
    wait_until(lambda: writer.failure)
    assert writer.failure == os.strerror(errno.EPIPE)
    writer.rest()  # although it waits for the next attempt
    assert "fdshare-log" not in [thread.name for thread in threading.enumerate()]
    os.close(full)


def test_where_no_thread_can_start(
    pipe: tuple[int, int], make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lines are written at the end, or by a thread that starts later; nobody waits."""

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")  # EAGAIN of clone(2)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        writer = make(pipe[1], room=5100)
        line = b"x" * 999 + b"\n"
        put(writer, *[line] * 6)
        assert writer.dropped == 1
        writer.flush(0.01)  # the pipe has room for one piece
        assert drain(pipe[0]) == line * 4
        writer.flush(0.01)
        assert drain(pipe[0]) == b"1 lost\n"
        writer.flush(20)
        assert drain(pipe[0]) == line
    put(writer, b"later\n")
    writer.flush(20)
    assert drain(pipe[0]) == b"later\n"


def test_a_descriptor_that_does_not_block_is_waited_for(pipe: tuple[int, int], make: Make) -> None:
    os.set_blocking(pipe[1], False)
    writer = make(pipe[1])
    line = b"x" * 999 + b"\n"
    for _ in range(20):
        put(writer, line)
    got = b""
    while len(got) < 20_000:
        got += os.read(pipe[0], 4096)
    assert got == line * 20
    assert writer.dropped == 0


def test_a_line_that_cannot_be_made_is_not_the_end(pipe: tuple[int, int], make: Make) -> None:
    writer = make(pipe[1])
    writer.put("bad", 3)
    writer.put("good\n", 5)
    writer.flush(20)
    assert os.read(pipe[0], 999) == b"a line could not be made: ValueError('a\\nb')\ngood\n"


def test_a_fork(pipe: tuple[int, int], make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the parent was given it writes itself; the child has a thread of its own."""
    # Longer than a machine at work may keep the thread from running.
    monkeypatch.setattr("fdshare.server.log_writer._STUCK", 20)
    writer = make(pipe[1])
    put(writer, b"before\n")
    writer.rest()
    assert all(thread.name != "fdshare-log" for thread in threading.enumerate())
    put(writer, b"parent\n")
    pid = os.fork()
    if not pid:
        try:
            writer.resume()
            put(writer, b"child\n")
            writer.flush(20)
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    writer.resume()
    writer.flush(20)
    lines = os.read(pipe[0], 999).splitlines()
    assert sorted(lines) == [b"before", b"child", b"parent"]


def test_a_fork_while_a_write_hangs(pipe: tuple[int, int], make: Make) -> None:
    writer = make(pipe[1])
    os.write(pipe[1], b"x" * 4096)
    put(writer, b"hangs\n")
    wait_until(lambda: not writer._items)
    writer.rest()  # returns
    writer.resume()
    drain(pipe[0])
    writer.flush(20)
    assert os.read(pipe[0], 99) == b"hangs\n"
    put(writer, b"next\n")
    writer.flush(20)
    assert os.read(pipe[0], 99) == b"next\n"
