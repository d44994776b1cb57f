"""The thread of a pool that replaces its workers. Where no process can be started, it tries again.

Derived from multiprocessing/pool.py of CPython 3.11 to 3.15, whose thread dies of an error of
starting a process. Nobody replaces a worker then, and the pool waits for ever.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, ClassVar

from fdshare.mp.family import Family
from fdshare.mp.stock import StockConnection, StockPool
from fdshare.mp.workers.process import START_FAILED, START_PAUSE

if TYPE_CHECKING:
    import queue

__all__ = ["LastJob", "WorkerHandlerMixin"]


class WorkerHandlerMixin(StockPool):
    """A Pool whose worker handler lives as long as the pool."""

    _family: ClassVar[Family]
    _handler: threading.Thread

    @property
    def _worker_handler(self) -> threading.Thread:
        return self._handler

    @_worker_handler.setter
    def _worker_handler(self, thread: threading.Thread) -> None:
        # The stock constructor makes it, of its own class's function, and starts it then.
        thread._target = self._handle_workers  # type: ignore[attr-defined]
        self._handler = thread

    def _get_sentinels(self) -> list[StockConnection]:
        """What wakes the thread, beside the workers' ends. The stock one's wakes for each result,
        too, and looks at all workers then."""
        return [self._change_notifier._reader]

    @classmethod
    def _handle_workers(cls, cache: Any, taskqueue: queue.SimpleQueue[Any], *args: Any) -> None:
        *workers, sentinels, change_notifier = args
        _, _, _, pool, *_ = workers
        module: Any = cls._family.pool
        thread: Any = threading.current_thread()
        pause: float | None = None
        while thread._state == module.RUN or (cache and thread._state != module.TERMINATE):
            cls._join_exited_workers(pool)
            try:
                cls._repopulate_pool_static(*workers)
                pause = None
            except START_FAILED as error:
                if pause is None:
                    cls._family.util.info("no worker can be started: %s", error)
                pause = START_PAUSE
            awaited = [*cls._get_worker_sentinels(pool), *sentinels]
            cls._wait_for_updates(awaited, change_notifier, pause)
        taskqueue.put(None)  # the end of the workers


class LastJob:
    """Wakes the thread that replaces workers when no job is left, if the pool is closed: then that
    thread ends. The stock one is woken each time, to look at all workers."""

    def __init__(self, pool: WorkerHandlerMixin) -> None:
        self._handler: Any = pool._worker_handler
        self._running = pool._family.pool.RUN
        self._notifier = pool._change_notifier

    def put(self, obj: object) -> None:
        # Who closes the pool first changes the state, and then wakes the thread.
        if self._handler._state != self._running:
            self._notifier.put(obj)
