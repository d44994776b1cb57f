"""Pool: tasks are pickled in the call that submits them, and no job can end the pool's threads.

Derived from multiprocessing/pool.py of CPython 3.11 to 3.13, whose threads, worker function and
results are used as they are. What changes: `apply_async` and `map*` pickle before they return
(`imap` as it takes each item), arguments of the initializer are held for the pool's life, and an
error of loading a task or a result is that job's own (tasks.py). A pool ends by shutdown(2) of its
channels, which wakes all that wait for them, and not by messages: for those there may be no room,
no reader and no lock, since a killed process keeps its locks.

stock.py has the private names that are used.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import suppress
from functools import partial
from queue import Empty
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from fdshare.kernel.process_limit import note_limits
from fdshare.mp.family import Family
from fdshare.mp.stock import (
    Function,
    StockApplyResult,
    StockContext,
    StockIMapIterator,
    StockMapResult,
    StockProcess,
    StockSimpleQueue,
)
from fdshare.mp.workers.maps import Numbered, WaitingTasks, tasks_of_map
from fdshare.mp.workers.pool_queues import (
    EndingQueueMixin,
    OutcomeQueueMixin,
    TaskQueueMixin,
)
from fdshare.mp.workers.tasks import Task, hold_initializer, release_initializer
from fdshare.mp.workers.worker_handler import LastJob, WorkerHandlerMixin

if TYPE_CHECKING:
    import queue
    from multiprocessing.pool import ApplyResult, IMapIterator, MapResult

__all__ = ["PoolMixin"]

S = TypeVar("S")
T = TypeVar("T")


class PoolMixin(WorkerHandlerMixin):
    """A Pool whose tasks and results carry descriptors."""

    _family: ClassVar[Family]
    _inqueue: TaskQueueMixin
    _task_queue: ClassVar[type[TaskQueueMixin]]
    _outcome_queue: ClassVar[type[OutcomeQueueMixin]]
    _apply_result: ClassVar[type[StockApplyResult]]
    _map_result: ClassVar[type[StockMapResult]]
    _imap_iterator: ClassVar[type[StockIMapIterator]]
    _imap_unordered_iterator: ClassVar[type[StockIMapIterator]]
    _state = "INIT"  # for __del__, where __init__ raises

    def __init__(
        self,
        processes: int | None = None,
        initializer: Function | None = None,
        initargs: Iterable[Any] = (),
        maxtasksperchild: int | None = None,
        context: StockContext | None = None,
    ) -> None:
        initializer, initargs = hold_initializer(self._family, initializer, initargs)
        try:
            super().__init__(processes, initializer, initargs, maxtasksperchild, context)
        except BaseException as error:
            note_limits(error)
            self._give_up()
            release_initializer(initializer, initargs)
            raise
        self._cache.notifier = LastJob(self)

    def _give_up(self) -> None:
        """End what a constructor that fails has started."""
        if not hasattr(self, "_cache"):
            return  # it has no channels yet
        by_worker, by_task, by_result = (
            getattr(self, name, None) or threading.Thread()
            for name in ("_worker_handler", "_task_handler", "_result_handler")
        )
        self._terminate_pool(
            self._taskqueue,
            self._inqueue,
            self._outqueue,
            self._pool,
            self._change_notifier,
            by_worker,
            by_task,
            by_result,
            self._cache,
        )

    def _setup_queues(self) -> None:
        self._inqueue = self._task_queue(ctx=self._ctx)
        self._outqueue = outqueue = self._outcome_queue(ctx=self._ctx)
        self._quick_get = outqueue.take

    @property
    def _quick_put(self) -> Callable[[Numbered | None], None]:  # type: ignore[override]
        """Sends a task, for the stock thread, which takes it when the cache is there."""
        return partial(_send, self._inqueue, self._cache)

    def apply_async(
        self,
        func: Callable[..., T],
        args: Iterable[Any] = (),
        kwds: Mapping[str, Any] | None = None,
        callback: Callable[[T], object] | None = None,
        error_callback: Callable[[BaseException], object] | None = None,
    ) -> ApplyResult[T]:
        """The result, when there is one, of `func(*args, **kwds)`.

        It is safe to close what is in the arguments after this call. Raises: whatever pickling
        them raises; DescriptorLimit.
        """
        self._check_running()
        call = func, args, {} if kwds is None else kwds
        task = Task.of(self._family, call, self._inqueue._writer._cache)
        result = self._apply_result(self, _survived(callback), _survived(error_callback))
        self._taskqueue.put(([(result._job, 0, task, (), {})], None))
        return result

    def apply(
        self,
        func: Callable[..., T],
        args: Iterable[Any] = (),
        kwds: Mapping[str, Any] | None = None,
    ) -> T:
        """What `func(*args, **kwds)` returns. Raises: what it raises, with its traceback."""
        return self.apply_async(func, args, kwds).get()

    def _map_async(
        self,
        func: Function,
        iterable: Iterable[Any],
        mapper: Function,
        chunksize: int | None = None,
        callback: Function | None = None,
        error_callback: Callable[[BaseException], object] | None = None,
    ) -> MapResult[Any]:
        self._check_running()
        items = iterable if isinstance(iterable, Sized) else list(iterable)
        if chunksize is None:
            chunksize, extra = divmod(len(items), self._processes * 4)
            chunksize += bool(extra)
        if len(items) == 0:
            chunksize = 0
        cache = self._inqueue._writer._cache
        tasks = tasks_of_map(self._family, mapper, func, items, chunksize, cache)
        callback, error_callback = _survived(callback), _survived(error_callback)
        result = self._map_result(self, chunksize, len(items), callback, error_callback)
        tasks.job = result._job
        self._taskqueue.put((tasks, None))
        return result

    def imap(
        self, func: Callable[[S], T], iterable: Iterable[S], chunksize: int | None = 1
    ) -> IMapIterator[T]:
        """What *func* returns for each item, in the order of the items.

        An item is pickled when it is drawn. Raises: what *func* raises for the item.
        """
        imap, cls = super().imap, self._imap_iterator
        results: IMapIterator[T] = self._results_of(imap, cls, func, iterable, chunksize)
        return results

    def imap_unordered(
        self, func: Callable[[S], T], iterable: Iterable[S], chunksize: int | None = 1
    ) -> IMapIterator[T]:
        """As `imap`, in the order in which there are results."""
        imap, cls = super().imap_unordered, self._imap_unordered_iterator
        results: IMapIterator[T] = self._results_of(imap, cls, func, iterable, chunksize)
        return results

    def _results_of(
        self,
        imap: Function,
        cls: type[StockIMapIterator],
        func: Function,
        iterable: Iterable[Any],
        chunksize: int | None,
    ) -> Any:
        """What *imap*, a method of the standard pool, returns, with a *cls* in it."""
        if chunksize is not None and chunksize > 1:
            chunks = self._get_tasks(func, iterable, chunksize)
            lists = self._results_of(imap, cls, self._family.pool.mapstar, chunks, 1)
            return (item for items in lists for item in items)
        results = imap(func, _until_it_raises(iterable), chunksize)
        results.__class__ = cls
        return results

    def terminate(self) -> None:
        """As the standard one's. What was submitted and not sent, and what is held of *initargs*,
        is closed when it returns."""
        super().terminate()
        release_initializer(self._initializer, self._initargs)

    def join(self) -> None:
        """As the standard one's. What is held of *initargs* is closed when it returns."""
        super().join()
        release_initializer(self._initializer, self._initargs)

    @classmethod
    def _terminate_pool(
        cls,
        taskqueue: queue.SimpleQueue[Any],
        inqueue: StockSimpleQueue,
        outqueue: StockSimpleQueue,
        pool: list[StockProcess],
        change_notifier: StockSimpleQueue,
        worker_handler: threading.Thread,
        task_handler: threading.Thread,
        result_handler: threading.Thread,
        cache: Any,
    ) -> None:
        """End the pool, whatever it is doing. It waits for its threads, and so for a callback or
        an iterable of the program's that one of them runs; for its workers, and so for one that
        goes on after SIGTERM; and for nothing else."""
        assert isinstance(inqueue, EndingQueueMixin)
        assert isinstance(outqueue, EndingQueueMixin)
        for handler in (worker_handler, task_handler, result_handler):
            handler._state = cls._family.pool.TERMINATE  # type: ignore[attr-defined]
        if worker_handler.is_alive():
            change_notifier.put(None)
            _join(worker_handler)  # it starts no worker from here on
        for worker in pool:
            if worker.exitcode is None:
                worker.terminate()
        inqueue.abandon()
        outqueue.abandon()
        taskqueue.put(None)  # a worker handler that failed to start a process has not said it
        _join(task_handler)
        _join(result_handler)
        for worker in pool:
            worker.join()
        _let_go(taskqueue)
        inqueue.close()
        outqueue.close()


def _send(tasks: TaskQueueMixin, jobs: Any, task: Numbered | None) -> None:
    """Sends *task*. An error that is no Exception becomes its job's here: the stock thread, which
    does that with an Exception, would end, and send no task from then on."""
    try:
        tasks.send_task(task)
    except Exception:
        raise
    except BaseException as error:
        assert task is not None
        job, index, *_ = task
        with suppress(KeyError):  # nobody waits for it any more
            jobs[job]._set(index, (False, error))


def _until_it_raises(items: Iterable[T]) -> Iterator[T | _Failed]:
    """*items*, for the thread that sends tasks. What they raise that is no Exception, and would end
    it, comes as an item."""
    try:
        # No `yield from`: that would close a generator of the program's with this one.
        for item in items:  # noqa: UP028
            yield item
    except (Exception, GeneratorExit):
        raise
    except BaseException as error:
        yield _Failed(error)


class _Failed:
    """An item that raises *error* when it is pickled."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def __reduce__(self) -> str:
        raise self._error


def _survived(callback: Function | None) -> Function | None:
    """*callback*; what it raises is reported as of a thread, and does not end that of the results:
    no job would be done from then on, that of the callback included."""
    if callback is None:
        return None

    def call(value: Any) -> None:
        try:
            callback(value)
        except BaseException:
            thread = threading.current_thread()
            threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), thread)))

    return call


def _join(thread: threading.Thread) -> None:
    # A callback may end its pool; and a thread may not have been started.
    if thread is not threading.current_thread() and thread.is_alive():
        thread.join()


def _let_go(taskqueue: queue.SimpleQueue[Any]) -> None:
    """Close what tasks hold that were never sent."""
    with suppress(Empty):
        while True:
            entry = taskqueue.get_nowait()
            tasks = () if entry is None else entry[0]
            if isinstance(tasks, WaitingTasks):
                tasks.close()
            elif type(tasks) is list:  # not an iterator of the program's
                for _, _, task, _, _ in tasks:
                    task.close()
