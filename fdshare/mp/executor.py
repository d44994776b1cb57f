"""A ProcessPoolExecutor that pickles in submit(), keeps tracebacks, and takes contexts of
multiprocess; an error of loading a result is that result's alone.

Over concurrent/futures/process.py of CPython 3.11 to 3.15. workers/executor_queues.py has the
queues, workers/executor_manager.py the thread, stock.py the private names that are used.
"""

from __future__ import annotations

import concurrent.futures
import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from fdshare.errors import InvalidArgument
from fdshare.kernel import system
from fdshare.kernel.process_limit import note_limits
from fdshare.mp.backends import backend_of, get_context
from fdshare.mp.context import Context
from fdshare.mp.family import Family
from fdshare.mp.stock import Function
from fdshare.mp.workers.executor_manager import ManagerThreadMixin, adopt_thread
from fdshare.mp.workers.executor_queues import Call, CallQueueMixin, ResultQueueMixin, adopt
from fdshare.mp.workers.process import START_FAILED
from fdshare.mp.workers.tasks import hold_initializer, release_initializer

if TYPE_CHECKING:
    from multiprocessing.context import BaseContext

    from fdshare.mp.pickling.bundle import Bundle

__all__ = ["ProcessPoolExecutor"]


P = ParamSpec("P")
T = TypeVar("T")


class ProcessPoolExecutor(concurrent.futures.ProcessPoolExecutor):
    """A ProcessPoolExecutor whose calls and results carry descriptors.

    *mp_context* may be one of ours, of multiprocessing or of multiprocess; None is ours of the
    default method. All else as the standard one.

    >>> with fdshare.ProcessPoolExecutor(1) as executor, open(os.devnull) as file:
    ...     executor.submit(type(file).close, file).result()  # the worker's copy
    ...     file.closed
    False
    """

    _family: Family
    _call_queue: CallQueueMixin
    _result_queue: ResultQueueMixin
    _mp_context: Context
    _initializer: Function | None
    _initargs: tuple[Any, ...]
    _max_workers: int
    _manager_thread: Any
    _pending_work_items: dict[int, Any]
    _processes: Any
    _queue_count: int
    _work_ids: Any
    _shutdown_thread: bool

    def __init__(
        self,
        max_workers: int | None = None,
        mp_context: BaseContext | None = None,
        initializer: Callable[..., object] | None = None,
        initargs: tuple[Any, ...] = (),
        *,
        max_tasks_per_child: int | None = None,
    ) -> None:
        context = _as_ours(mp_context, max_tasks_per_child is not None)
        self._family = context._family
        start, held = hold_initializer(self._family, initializer, initargs)
        super().__init__(
            max_workers, context, start, tuple(held), max_tasks_per_child=max_tasks_per_child
        )
        # A signal's handler that raises in Queue.put() may leave the queue locked, or an item that
        # shutdown() waits for and nobody does. Nothing comes in between in this one.
        self._work_ids = queue.SimpleQueue()
        semaphore = context.Semaphore(0) if system.HAS_SEM_GETVALUE else None
        adopt(context._classes.CallQueue, self._call_queue, semaphore)
        self._result_queue.close()
        self._result_queue = context._classes.ResultQueue(ctx=context)
        self._result_queue.watch(self._processes)

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """The future of `fn(*args, **kwargs)`. It is safe to close what is in it after this call.

        Raises: whatever pickling raises; DescriptorLimit; as the standard one.
        """
        calls: CallQueueMixin | None = self._call_queue  # None after shutdown()
        cache = None if calls is None else calls._writer._cache
        call = Call.of(self._family, (fn, args, kwargs), cache)
        bundle = call.bundle
        try:
            future: Future[T] = super().submit(call)
        except BaseException:
            self._withdraw(call)
            raise
        if bundle is not None:
            # It is cancelled, or the pool is broken: the standard one keeps the call until a worker
            # is free, or the executor is dropped.
            future.add_done_callback(partial(_close, weakref.ref(bundle)))
        return future

    def _withdraw(self, call: Call) -> None:
        """Have a *call* that could not be submitted never run."""
        for work_id, item in list(self._pending_work_items.items()):
            if item.fn is call:
                # A signal's handler may have raised before it was counted.
                self._queue_count = max(self._queue_count, work_id + 1)
                item.future.cancel()
        call.close()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """As the standard one's; what it holds of *initargs* is closed after the last worker."""
        manager = self._executor_manager_thread
        held = self._initializer, self._initargs
        if manager is not None:
            manager.executor = self  # whose wish to cancel it reads
            weakref.finalize(manager, release_initializer, *held).atexit = False
            del manager
        elif not self._shutdown_thread:  # it never had a worker
            release_initializer(*held)
        super().shutdown(wait, cancel_futures=cancel_futures)

    def _adjust_process_count(self) -> None:
        thread = threading.current_thread()
        if isinstance(thread, ManagerThreadMixin) and thread.replaces_workers_of(self):
            return
        try:
            super()._adjust_process_count()
        except START_FAILED:
            # Those that there are do the call, or their replacement, which the thread starts.
            if self._executor_manager_thread is None:
                raise

    def _start_executor_manager_thread(self) -> None:
        if self._executor_manager_thread is not None:
            return
        try:
            super()._start_executor_manager_thread()
        except BaseException as error:
            note_limits(error)
            self._manager_thread = None
            for worker in self._processes.values():
                worker.kill()
                worker.join()
            self._processes.clear()
            raise

    @property
    def _executor_manager_thread(self) -> Any:
        return self._manager_thread

    @_executor_manager_thread.setter
    def _executor_manager_thread(self, thread: Any) -> None:
        if thread is not None:  # the standard executor has made it, and starts it then
            adopt_thread(thread, self)
        self._manager_thread = thread

    def __repr__(self) -> str:
        return f"<ProcessPoolExecutor of {self._mp_context!r}>"


def _close(bundle: weakref.ref[Bundle], _: Future[Any]) -> None:
    held = bundle()
    if held is not None:
        held.close()


def _as_ours(context: BaseContext | None, replaces_workers: bool) -> Context:
    if context is None:
        return get_context("spawn" if replaces_workers else None)
    if isinstance(context, Context):
        return context
    package = type(context).__module__.partition(".")[0]
    try:
        backend_of(package)
    except ValueError:
        raise InvalidArgument(
            "mp_context", f"{context!r} is a context of neither multiprocessing nor multiprocess"
        ) from None
    return get_context(context.get_start_method(), backend=package)
