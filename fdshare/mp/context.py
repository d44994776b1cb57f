"""get_context: a multiprocessing context whose channels carry descriptors.

Derived from multiprocessing/context.py of CPython 3.11 to 3.13: each context is the package's own,
with our Pipe, Queue, JoinableQueue, SimpleQueue, Pool, Manager and Process. Locks, events, values,
arrays and everything else are the package's.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, ClassVar

from fdshare.errors import InvalidArgument
from fdshare.mp.family import Family, family_of

__all__ = ["ContextMixin", "get_context"]


def get_context(method: str | None = None, *, backend: str | ModuleType = "multiprocessing") -> Any:
    """A context for *method* ("fork", "spawn", "forkserver"; None: the backend's default).

    *backend* is "multiprocessing" or "multiprocess", or that module. The context offers everything
    that `backend.get_context(method)` does; sockets, files, connections and every other kind go
    through its pipes, queues, pools and managers.

    Raises: ValueError: no such method or backend.
    """
    name = backend if isinstance(backend, str) else backend.__name__
    try:
        family = family_of(name)
    except ValueError as error:
        raise InvalidArgument("backend", str(error)) from None
    stock = family.module("context")._default_context
    if method is None:
        method = stock.get_start_method()
    if method not in family.classes.CONTEXTS:
        raise ValueError(f"cannot find context for {method!r}")
    return family.classes.CONTEXTS[method]


class ContextMixin:
    """A context whose channels carry descriptors."""

    _family: ClassVar[Family]

    def Pipe(self, duplex: bool = True) -> Any:
        """Two connections, the ends of one pipe: (reader, writer) where not *duplex*."""
        return self._family.classes.Pipe(duplex)

    def Queue(self, maxsize: int = 0) -> Any:
        """A queue; *maxsize* 0 is no limit."""
        return self._family.classes.Queue(maxsize, ctx=self)

    def JoinableQueue(self, maxsize: int = 0) -> Any:
        """A queue with task_done() and join()."""
        return self._family.classes.JoinableQueue(maxsize, ctx=self)

    def SimpleQueue(self) -> Any:
        """A queue without a thread; put() waits while it is full."""
        return self._family.classes.SimpleQueue(ctx=self)

    def Pool(
        self,
        processes: int | None = None,
        initializer: Any = None,
        initargs: Any = (),
        maxtasksperchild: int | None = None,
    ) -> Any:
        """A pool of worker processes."""
        return self._family.classes.Pool(
            processes, initializer, initargs, maxtasksperchild, context=self
        )

    def Manager(self) -> Any:
        """A started manager; its proxies carry what they are given."""
        manager = self._family.classes.SyncManager(ctx=self)
        manager.start()
        return manager

    def get_context(self, method: str | None = None) -> Any:
        """This context, or the one of ours for *method*. Raises: ValueError."""
        return self if method is None else get_context(method, backend=self._family.package)

    def __reduce__(self: Any) -> Any:
        return _context, (self._name, self._family.package)


def _context(method: str, package: str) -> Any:
    return get_context(method, backend=package)
