"""ReaderLock, by itself; test_pool.py and test_executor_queues.py kill those who hold it."""

from __future__ import annotations

import os
import signal
import sys

import pytest
from breaking import has_record_lock

from fdshare import get_context
from fdshare.mp.workers.reader_lock import ReaderLock

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="record locks on sockets")


def test_it_is_held_by_one_process_until_that_releases_it_or_ends() -> None:
    reader, writer = get_context("fork").Pipe(duplex=False)
    lock = ReaderLock(reader)
    with reader, writer:
        with lock:
            assert has_record_lock(os.getpid())
        assert not has_record_lock(os.getpid())
        told, tell = os.pipe()
        pid = os.fork()
        if not pid:
            lock.acquire()
            os.write(tell, b"x")
            signal.pause()
            os._exit(1)
        try:
            os.read(told, 1)
            assert not lock.acquire(False)
            assert not lock.acquire(True, 0.01)
            assert not lock.acquire(True, -1)
        finally:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
        assert lock.acquire(True, 10)
        lock.release()
        assert lock.acquire(False)
        lock.release()
    os.close(told)
    os.close(tell)
