"""The thread of an executor replaces its workers. Where no process can be started, it tries again.

Derived from concurrent/futures/process.py of CPython 3.11 to 3.15. After a worker has done its
max_tasks_per_child, the standard thread may take another one for idle and start none
(cpython#115634). It starts none for an executor that was shut down without waiting, or dropped.
Where a start fails it dies, or breaks the executor (3.14). Before 3.14 the end of the interpreter
may wake it while it closes the pipe for that, and raise.
"""

from __future__ import annotations

import sys
import threading
import traceback
import weakref
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any, Final

from fdshare.mp.stock import Function, StockExecutorManager, StockThreadWakeup, executor_module
from fdshare.mp.workers.process import START_FAILED, START_PAUSE

__all__ = ["ManagerThreadMixin", "adopt_thread"]

Awaited = tuple[Any, bool, list[str] | None]


def adopt_thread(thread: StockExecutorManager, executor: Any) -> None:
    """Makes the *thread* of an executor one of ours, in place, before it starts."""
    thread.__class__ = _ManagerThread
    assert isinstance(thread, ManagerThreadMixin)
    thread._mp_context = executor._mp_context
    if thread.max_tasks_per_child is not None:  # else none is replaced, and it need not keep these
        thread._initializer = executor._initializer, executor._initargs
    thread._max_workers = executor._max_workers
    wakeup: Any = thread.thread_wakeup
    if not hasattr(wakeup, "_lock"):  # before Python 3.14
        wakeup._lock = threading.RLock()
        wakeup.__class__ = _ThreadWakeup
    collected = _before_the_end(thread.executor_reference.__callback__)
    thread.executor_reference = weakref.ref(executor, collected)


def _before_the_end(
    callback: Callable[[weakref.ref[Any]], None],
) -> Callable[[weakref.ref[Any]], None]:
    """*callback*, which wakes the thread; at the end of the interpreter it does nothing.

    It takes a lock, and the thread may have stopped with that if nobody has waited for it, because
    of a Ctrl-C for instance.
    """
    is_finalizing = sys.is_finalizing  # of the closure, which keeps its names

    def call(reference: weakref.ref[Any]) -> None:
        if not is_finalizing():
            callback(reference)

    return call


class ManagerThreadMixin(StockExecutorManager):
    """What replaces the workers of an executor until all is done."""

    _mp_context: Any
    _initializer: tuple[Function | None, tuple[Any, ...]]
    _max_workers: int
    _missing = 0  # workers that have ended, and are to be replaced

    def replaces_workers_of(self, executor: Any) -> bool:
        """Whether it does that next, for *executor*, and needs nobody else to start a worker.

        The standard thread, before 3.14, has the executor do it, by a method that is also
        submit()'s, which a callback of a future may call in this thread.
        """
        return self._missing > 0 and self.executor_reference() is executor

    def process_result_item(self, result_item: Any) -> None:
        super().process_result_item(result_item)
        if result_item.exit_pid is not None:
            self._missing += 1

    def wait_result_broken_or_wakeup(self) -> Awaited:
        while self._missing and (self.pending_work_items or not self.is_shutting_down()):
            try:
                self._start_worker()
            except START_FAILED:
                if wait(self._awaited(), START_PAUSE):
                    break
            except Exception as error:
                return None, True, traceback.format_exception(error)
        return super().wait_result_broken_or_wakeup()

    def _start_worker(self) -> None:
        with self.shutdown_lock:
            # submit() may have started one; terminate_workers() (3.14) wants none.
            forced = getattr(self.executor_reference(), "_force_shutting_down", False)
            if len(self.processes) < self._max_workers and not forced:
                queues = self.call_queue, self.result_queue
                process = self._mp_context.Process(
                    target=executor_module()._process_worker,
                    args=(*queues, *self._initializer, self.max_tasks_per_child),
                )
                process.start()
                self.processes[process.pid] = process
            self._missing -= 1

    def _awaited(self) -> list[Any]:
        workers = [worker.sentinel for worker in list(self.processes.values())]
        return [self.result_queue._reader, self.thread_wakeup._reader, *workers]

    def _replace_dead_worker(self) -> Any:
        """Nothing: the thread replaces it before it waits. (3.14 asks for it.)"""
        if getattr(self.executor_reference(), "_force_shutting_down", False):
            return super()._replace_dead_worker()  # type: ignore[misc]
        return None


class ThreadWakeupMixin(StockThreadWakeup):
    """What wakes the thread. It is not closed between the look whether it is closed and the write:
    that would raise, or go to a descriptor that has its number by then."""

    _lock: Any  # of threading.RLock: a finaliser may wake the thread during a call

    def close(self) -> None:
        with self._lock:
            super().close()

    def wakeup(self) -> None:
        with self._lock:
            super().wakeup()


_ThreadWakeup: Final = type(
    "ThreadWakeup",
    (ThreadWakeupMixin, executor_module()._ThreadWakeup),
    {"__doc__": ThreadWakeupMixin.__doc__},
)
_ManagerThread: Final = type(
    "ManagerThread",
    (ManagerThreadMixin, executor_module()._ExecutorManagerThread),
    {"__doc__": ManagerThreadMixin.__doc__},
)
