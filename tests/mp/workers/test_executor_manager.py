"""The thread of an executor: it replaces workers, for as long as there is something to do."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import Future
from threading import Event

import pytest
from crowding import run_crowded
from users import needs_root

from fdshare import ProcessPoolExecutor, get_context
from mp.common import PACKAGES, trackers  # noqa: F401
from mp.workers.test_worker_handler import BEGINS

WAITS = """
from fdshare import ProcessPoolExecutor
from concurrent.futures import CancelledError, wait
def outcome(future):
    try:
        return future.result(30)
    except CancelledError:
        return "cancelled"
executor = ProcessPoolExecutor(1, ctx, max_tasks_per_child=1)
executor.submit(os.getpid).result()
with crowd:
    futures = [executor.submit(abs, -number) for number in range(4)]
    wait(futures, 0.5)
    before = len(os.listdir("/proc/self/fd"))
    wait(futures, 0.5)
    print(futures[3].done(), len(os.listdir("/proc/self/fd")) < before + 10)  # of an attempt
print([future.result(30) for future in futures])
with crowd:
    futures = [executor.submit(abs, -number) for number in range(8)]
    wait(futures, 0.5)
    executor.shutdown(wait=False, cancel_futures=True)
print([outcome(future) for future in futures][7])
"""

pytestmark = pytest.mark.parametrize("package", PACKAGES)


@needs_root
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_calls_wait_until_a_process_can_be_started(package: str, method: str) -> None:
    """The thread died, or broke the executor."""
    output, errors = run_crowded(BEGINS + WAITS, method, package)
    assert output == "False True\n[0, 1, 2, 3]\ncancelled\n"
    assert not errors or method == "forkserver"  # which prints why it dies


def test_an_executor_that_is_dropped_does_all_that_was_submitted(package: str) -> None:
    ctx = get_context("spawn", backend=package)
    executor = ProcessPoolExecutor(1, ctx, max_tasks_per_child=1)
    futures = [executor.submit(abs, -number) for number in range(3)]
    manager = executor._executor_manager_thread
    del executor
    assert [future.result(60) for future in futures] == [0, 1, 2]
    manager.join(60)
    assert not manager.is_alive()


def test_a_callback_that_submits_starts_no_more_workers_than_there_may_be(package: str) -> None:
    ctx = get_context("spawn", backend=package)
    done = Event()
    with ProcessPoolExecutor(2, ctx, max_tasks_per_child=100) as executor:
        first = executor.submit(os.getpid)
        later: list[Future[float]] = []

        def submit(_: Future[int]) -> None:
            later.extend(executor.submit(time.process_time) for _ in range(5))
            done.set()

        first.add_done_callback(submit)
        assert done.wait(60)
        assert len([future.result(60) for future in later]) == 5
        assert len(executor._processes) <= 2


# The thread has ended when it is acquired, and might as well have stopped there. (sys goes last.)
STOPPED = """
import atexit, sys
import fdshare
executor = fdshare.ProcessPoolExecutor(1, fdshare.get_context("fork", backend=sys.argv[1]))
assert executor.submit(abs, -1).result(30) == 1
sys.thread = executor._executor_manager_thread
atexit.register(executor._shutdown_lock.acquire)
"""


def test_the_end_of_the_interpreter_waits_for_no_lock_of_the_thread(package: str) -> None:
    """After a Ctrl-C while it waited for the thread, it waited for ever."""
    done = subprocess.run(
        [sys.executable, "-c", STOPPED, package], stderr=subprocess.PIPE, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_thread_is_woken_while_it_ends(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by the end of the interpreter, which said "OSError: handle is closed"."""
    with ProcessPoolExecutor(1, get_context("fork", backend=package)) as executor:
        executor.submit(abs, -1).result(60)
        thread = executor._executor_manager_thread
        writer = thread.thread_wakeup._writer
        send = writer.send_bytes

        def send_late(data: bytes) -> None:
            executor._shutdown_thread = True
            send(data)  # the thread ends, and would close it
            thread.join(0.5)
            send(data)

        monkeypatch.setattr(writer, "send_bytes", send_late)
        thread.thread_wakeup.wakeup()
        monkeypatch.undo()
