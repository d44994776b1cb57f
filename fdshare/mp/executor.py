"""ProcessPoolExecutor that pickles in submit(), opens results under guard, keeps tracebacks, and
takes contexts of multiprocess.

Over concurrent/futures/process.py of CPython 3.11 to 3.13. Private names used: `_call_queue` and
`_result_queue` of the executor: the same in 3.9 to 3.14. workers/executor_queues.py has the queues.
"""

from __future__ import annotations

import concurrent.futures
from concurrent.futures import Future
from typing import Any

from fdshare.errors import InvalidArgument
from fdshare.mp.backends import backend_of, get_context
from fdshare.mp.context import ContextMixin
from fdshare.mp.family import Family
from fdshare.mp.workers.executor_queues import Call, adopt
from fdshare.mp.workers.tasks import hold_initializer

__all__ = ["ProcessPoolExecutor"]


class ProcessPoolExecutor(concurrent.futures.ProcessPoolExecutor):
    """A ProcessPoolExecutor whose calls and results carry descriptors.

    *mp_context* may be one of ours, of multiprocessing or of multiprocess; None is ours of the
    default method. All else as the standard one.
    """

    def __init__(
        self,
        max_workers: int | None = None,
        mp_context: Any = None,
        initializer: Any = None,
        initargs: Any = (),
        **options: Any,
    ) -> None:
        context = _as_ours(mp_context, options.get("max_tasks_per_child") is not None)
        family = self._family = context._family
        initializer, initargs = hold_initializer(family, initializer, initargs)
        super().__init__(max_workers, context, initializer, initargs, **options)
        adopt(context._classes.CallQueue, self._call_queue)
        self._result_queue.close()
        self._result_queue = context._classes.ResultQueue(ctx=context)

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        """The future of `fn(*args, **kwargs)`. It is safe to close what is in it after this call.

        Raises: whatever pickling raises; DescriptorLimit; as the standard one.
        """
        return super().submit(Call.of(self._family, fn, args, kwargs))

    def __repr__(self) -> str:
        return f"<ProcessPoolExecutor of {self._mp_context!r}>"

    _family: Family
    _call_queue: Any
    _result_queue: Any


def _as_ours(context: Any, replaces_workers: bool) -> Any:
    if context is None:
        return get_context("spawn" if replaces_workers else None)
    if isinstance(context, ContextMixin):
        return context
    package = type(context).__module__.partition(".")[0]
    try:
        backend_of(package)
    except ValueError:
        raise InvalidArgument(
            "mp_context", f"{context!r} is a context of neither multiprocessing nor multiprocess"
        ) from None
    return get_context(context.get_start_method(), backend=package)
