"""ReaderLock, by itself; test_pool.py and test_executor_queues.py kill those who hold it."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from breaking import ended, has_flock, waits_for_lock
from conftest import wait_until

from fdshare.mp.workers import reader_lock
from fdshare.mp.workers.reader_lock import ReaderLock
from mp.common import descriptor_limit_reached, ends, open_now

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="descriptions of a process's own")


@pytest.fixture
def lock() -> Iterator[ReaderLock]:
    before = open_now()
    lock = ReaderLock.create()
    assert lock is not None
    yield lock
    lock.close()
    lock.close()
    assert open_now() == before


@contextmanager
def forked(function: Callable[[], object]) -> Iterator[int]:
    """The pid of a child that has done *function* and waits, until it is killed here."""
    told, tell = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            function()
            os.write(tell, b"x")
            signal.pause()
        finally:
            os._exit(1)
    os.close(tell)
    try:
        assert os.read(told, 1)
        yield pid
    finally:
        os.close(told)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_it_is_held_by_one_process_until_that_releases_it_or_ends(lock: ReaderLock) -> None:
    with lock:
        assert has_flock(os.getpid())
    assert not has_flock(os.getpid())
    with forked(lock.acquire):
        assert not lock.acquire(False)
        assert not lock.acquire(True, 0.01)
        assert not lock.acquire(True, -1)
    assert lock.acquire(True, 10)
    lock.release()
    assert lock.acquire(False)
    lock.release()


def test_a_forked_child_does_not_have_its_parents(lock: ReaderLock) -> None:
    grandchildren, tell = os.pipe()

    def fork() -> None:
        lock.acquire()
        if not os.fork():
            os.write(tell, b"%d" % os.getpid())
            signal.pause()

    grandchild = 0
    try:
        with forked(fork):
            grandchild = int(os.read(grandchildren, 20))
            assert not lock.acquire(False)
        assert lock.acquire(False)
        lock.release()
    finally:
        if grandchild:
            os.kill(grandchild, signal.SIGKILL)
        os.close(grandchildren)
        os.close(tell)


def test_a_child_that_is_forked_at_the_limit_has_its_own(lock: ReaderLock) -> None:
    told, tell = os.pipe()
    with lock, descriptor_limit_reached():
        pid = os.fork()
        if not pid:
            try:
                os.write(tell, b"y" if lock.acquire(False) else b"n")
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
    assert os.read(told, 1) == b"n"
    os.close(told)
    os.close(tell)


def test_a_child_that_has_no_proc_has_no_lock(
    lock: ReaderLock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor one of whatever has that number by then."""
    told, tell = os.pipe()
    monkeypatch.setattr(reader_lock, "_OWN", "/nowhere/%d")
    pid = os.fork()
    if not pid:
        try:
            with open(os.devnull) as file:
                os.write(tell, b"%d" % (file.fileno() == lock._number))
            lock.acquire(False)
        except ValueError:  # of a number below 0
            os.write(tell, b" refused")
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    os.close(tell)
    with open(told) as said:
        assert said.read() == "0 refused"


def test_none_is_made_at_the_limit() -> None:
    with descriptor_limit_reached(), pytest.raises(OSError) as caught:
        ReaderLock.create()
    assert caught.value.errno == errno.EMFILE


def test_without_proc_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_lock, "_OWN", "/nowhere/%d")
    assert ReaderLock.create() is None


def wait_in_a_circle(path: Path) -> None:
    """This process has the lock of the readers, and a thread of it waits for one of fcntl(2) that a
    child has, which waits for the first: the kernel refuses to wait in a circle of the latter."""
    lock = ReaderLock.create()
    assert lock is not None
    with path.open("w") as file:
        go, begin = os.pipe()

        def take() -> None:
            fcntl.lockf(file, fcntl.LOCK_EX)
            threading.Thread(target=wait).start()

        def wait() -> None:
            os.read(go, 1)
            with lock:
                fcntl.lockf(file, fcntl.LOCK_UN)

        with lock, forked(take) as pid:
            thread = threading.Thread(target=fcntl.lockf, args=(file, fcntl.LOCK_EX))
            thread.start()
            wait_until(lambda: waits_for_lock(os.getpid()))
            os.write(begin, b"x")
            wait_until(lambda: waits_for_lock(pid) or not thread.is_alive())
            assert not ended(pid)
            assert thread.is_alive()
            lock.release()
            thread.join()


def test_threads_of_the_program_wait_for_locks_of_their_own(tmp_path: Path) -> None:
    ends(wait_in_a_circle, tmp_path / "locked")
