"""Pool: tasks are pickled where they are submitted, and no job can end the pool's threads.

Derived from multiprocessing/pool.py of CPython 3.11 to 3.13, whose threads, worker function and
results are used as they are. What changes: `apply_async` and `map*` pickle before they return
(`imap` when each item is drawn), arguments of the initializer are held for the pool's life, tasks
and results are opened under guard (tasks.py).

stock.py has the private names that are used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sized
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, TypeVar

from fdshare.mp.channels.queues import SimpleQueueMixin
from fdshare.mp.family import Family
from fdshare.mp.pickling.reducers import dumps
from fdshare.mp.stock import Function, StockContext, StockPool
from fdshare.mp.workers.tasks import Outcome, Task, hold_initializer, receive_patiently

if TYPE_CHECKING:
    from multiprocessing.pool import ApplyResult, MapResult

__all__ = ["OutcomeQueueMixin", "PoolMixin", "TaskQueueMixin"]


T = TypeVar("T")
# What a pool's thread sends: job, index, function, args, kwds.
Numbered: TypeAlias = tuple[int, int | None, Function, tuple[Any, ...], dict[str, Any]]


class PoolMixin(StockPool):
    """A Pool whose tasks and results carry descriptors."""

    _family: ClassVar[Family]
    _task_queue: ClassVar[type[TaskQueueMixin]]
    _outcome_queue: ClassVar[type[OutcomeQueueMixin]]

    def __init__(
        self,
        processes: int | None = None,
        initializer: Function | None = None,
        initargs: Iterable[Any] = (),
        maxtasksperchild: int | None = None,
        context: StockContext | None = None,
    ) -> None:
        initializer, initargs = hold_initializer(self._family, initializer, initargs)
        super().__init__(processes, initializer, initargs, maxtasksperchild, context)

    def _setup_queues(self) -> None:
        self._inqueue = inqueue = self._task_queue(ctx=self._ctx)
        self._outqueue = outqueue = self._outcome_queue(ctx=self._ctx)
        self._quick_put = inqueue.send_task
        self._quick_get = outqueue.take

    def apply_async(
        self,
        func: Callable[..., T],
        args: Iterable[Any] = (),
        kwds: Mapping[str, Any] | None = None,
        callback: Callable[[T], object] | None = None,
        error_callback: Callable[[BaseException], object] | None = None,
    ) -> ApplyResult[T]:
        """The result to be of `func(*args, **kwds)`.

        It is safe to close what is in the arguments after this call. Raises: whatever pickling
        them raises; DescriptorLimit.
        """
        self._check_running()
        task = Task.of(self._family, func, args, {} if kwds is None else kwds)
        result = self._family.pool.ApplyResult(self, callback, error_callback)
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
            chunksize, extra = divmod(len(items), len(self._pool) * 4)
            chunksize += bool(extra)
        if len(items) == 0:
            chunksize = 0
        tasks = [
            Task.of(self._family, mapper, (batch,), {})
            for batch in self._get_tasks(func, items, chunksize)
        ]
        result = self._family.pool.MapResult(self, chunksize, len(items), callback, error_callback)
        numbered: list[Numbered] = [
            (result._job, index, task, (), {}) for index, task in enumerate(tasks)
        ]
        self._taskqueue.put((numbered, None))
        return result


class TaskQueueMixin(SimpleQueueMixin):
    """From the pool to its workers."""

    def send_task(self, task: Numbered | None) -> None:
        """Send (job, index, function, args, kwds), or None, the end."""
        self.put(self._packed(task) if task is not None else None)
        if task is not None and type(task[2]) is Task:
            task[2].bundle.close()  # the kernel has it

    def _packed(self, task: Numbered) -> Numbered:
        job, index, function, args, kwds = task
        if type(function) is Task or function is self._family.pool._helper_reraises_exception:
            return task
        call = Task(self._family, dumps(self._family, (function, args, kwds)))
        return job, index, call, (), {}

    def get(self) -> Any:
        """The next task, its call still a bundle."""
        return receive_patiently(self._reader, self._rlock)


class OutcomeQueueMixin(SimpleQueueMixin):
    """From the workers to the pool."""

    def put(self, obj: Any) -> None:
        """Send (job, index, (ok, value)), or None, the end. Raises: whatever pickling raises."""
        if obj is not None:
            job, index, (ok, value) = obj
            obj = job, index, Outcome.of(self._family, ok, value)
        SimpleQueueMixin.put(self, obj)

    def take(self) -> Any:
        """The next (job, index, (ok, value)), for the pool's only reader; None is the end."""
        message = receive_patiently(self._reader)
        if message is None:
            return None
        job, index, outcome = message
        return job, index, outcome.open(self._family)
