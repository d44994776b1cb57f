"""Pool: tasks are pickled where they are submitted, and no job can end the pool's threads.

Derived from multiprocessing/pool.py of CPython 3.11 to 3.13, whose threads, worker function and
results are used as they are. What changes: `apply_async` and `map*` pickle before they return
(`imap` when each item is drawn), arguments of the initializer are held for the pool's life, tasks
and results are opened under guard (tasks.py).

Private names used, the same from 3.8 to 3.14: `_setup_queues`, `_map_async`, `_get_tasks`,
`_check_running`, `_taskqueue`, `_quick_put`, `_quick_get`, `_inqueue`, `_outqueue`, `_pool`,
`_ctx`; `mapstar`, `ApplyResult`, `MapResult` and `_helper_reraises_exception` of the module.
"""

from __future__ import annotations

from typing import Any, ClassVar

from fdshare.mp.channels.queues import SimpleQueueMixin
from fdshare.mp.family import Family
from fdshare.mp.pickling.reducers import dumps
from fdshare.mp.workers.tasks import Outcome, Task, hold_initializer, receive_patiently

__all__ = ["OutcomeQueueMixin", "PoolMixin", "TaskQueueMixin"]


class PoolMixin:
    """A Pool whose tasks and results carry descriptors."""

    _family: ClassVar[Family]
    _task_queue: ClassVar[Any]
    _outcome_queue: ClassVar[Any]

    def __init__(
        self: Any,
        processes: int | None = None,
        initializer: Any = None,
        initargs: Any = (),
        maxtasksperchild: int | None = None,
        context: Any = None,
    ) -> None:
        initializer, initargs = hold_initializer(self._family, initializer, initargs)
        super().__init__(processes, initializer, initargs, maxtasksperchild, context)  # type: ignore[call-arg]

    def _setup_queues(self: Any) -> None:
        self._inqueue = self._task_queue(ctx=self._ctx)
        self._outqueue = self._outcome_queue(ctx=self._ctx)
        self._quick_put = self._inqueue.send_task
        self._quick_get = self._outqueue.take

    def apply_async(
        self: Any,
        func: Any,
        args: Any = (),
        kwds: Any = None,
        callback: Any = None,
        error_callback: Any = None,
    ) -> Any:
        """The result to be of `func(*args, **kwds)`.

        It is safe to close what is in the arguments after this call. Raises: whatever pickling
        them raises; DescriptorLimit.
        """
        self._check_running()
        task = Task.of(self._family, func, args, {} if kwds is None else kwds)
        result = self._family.module("pool").ApplyResult(self, callback, error_callback)
        self._taskqueue.put(([(result._job, 0, task, (), {})], None))
        return result

    def apply(self: Any, func: Any, args: Any = (), kwds: Any = None) -> Any:
        """What `func(*args, **kwds)` returns. Raises: what it raises, with its traceback."""
        return self.apply_async(func, args, kwds).get()

    def _map_async(
        self: Any,
        func: Any,
        iterable: Any,
        mapper: Any,
        chunksize: int | None = None,
        callback: Any = None,
        error_callback: Any = None,
    ) -> Any:
        self._check_running()
        if not hasattr(iterable, "__len__"):
            iterable = list(iterable)
        if chunksize is None:
            chunksize, extra = divmod(len(iterable), len(self._pool) * 4)
            chunksize += bool(extra)
        if len(iterable) == 0:
            chunksize = 0
        tasks = [
            Task.of(self._family, mapper, (batch,), {})
            for batch in self._get_tasks(func, iterable, chunksize)
        ]
        result = self._family.module("pool").MapResult(
            self, chunksize, len(iterable), callback, error_callback=error_callback
        )
        numbered: list[Any] = [
            (result._job, index, task, (), {}) for index, task in enumerate(tasks)
        ]
        self._taskqueue.put((numbered, None))
        return result


class TaskQueueMixin(SimpleQueueMixin):
    """From the pool to its workers."""

    def send_task(self: Any, task: Any) -> None:
        """Send (job, index, function, args, kwds), or None, the end."""
        self.put(self._packed(task) if task is not None else None)
        if task is not None and type(task[2]) is Task:
            task[2].bundle.close()  # the kernel has it

    def _packed(self: Any, task: Any) -> Any:
        job, index, function, args, kwds = task
        pool = self._family.module("pool")
        if type(function) is Task or function is pool._helper_reraises_exception:
            return task
        call = Task(self._family, dumps(self._family, (function, args, kwds)))
        return job, index, call, (), {}

    def get(self: Any) -> Any:
        """The next task, its call still a bundle."""
        return receive_patiently(self._reader, self._rlock)


class OutcomeQueueMixin(SimpleQueueMixin):
    """From the workers to the pool."""

    def put(self: Any, obj: Any) -> None:
        """Send (job, index, (ok, value)), or None, the end. Raises: whatever pickling raises."""
        if obj is not None:
            job, index, (ok, value) = obj
            obj = job, index, Outcome.of(self._family, ok, value)
        SimpleQueueMixin.put(self, obj)

    def take(self: Any) -> Any:
        """The next (job, index, (ok, value)), for the pool's only reader; None is the end."""
        message = receive_patiently(self._reader)
        if message is None:
            return None
        job, index, outcome = message
        return job, index, outcome.open(self._family)
