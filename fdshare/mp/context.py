"""A multiprocessing context whose channels carry descriptors.

Derived from multiprocessing/context.py of CPython 3.11 to 3.13: each context is the package's own,
with our Pipe, Queue, JoinableQueue, SimpleQueue, Pool, Manager and Process. Locks, events, values,
arrays and everything else are the package's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from fdshare.mp.classes import Classes
from fdshare.mp.family import Family

__all__ = ["ContextMixin", "find_context", "make_contexts"]


class ContextMixin:
    """A context whose channels carry descriptors."""

    _family: ClassVar[Family]
    _classes: ClassVar[Classes]
    _contexts: ClassVar[Mapping[str, Any]]  # method -> the one of ours over the same package

    def Pipe(self, duplex: bool = True) -> Any:
        """Two connections, the ends of one pipe: (reader, writer) where not *duplex*."""
        return self._classes.Pipe(duplex)

    def Queue(self, maxsize: int = 0) -> Any:
        """A queue; *maxsize* 0 is no limit."""
        return self._classes.Queue(maxsize, ctx=self)

    def JoinableQueue(self, maxsize: int = 0) -> Any:
        """A queue with task_done() and join()."""
        return self._classes.JoinableQueue(maxsize, ctx=self)

    def SimpleQueue(self) -> Any:
        """A queue without a thread; put() waits while it is full."""
        return self._classes.SimpleQueue(ctx=self)

    def Pool(
        self,
        processes: int | None = None,
        initializer: Any = None,
        initargs: Any = (),
        maxtasksperchild: int | None = None,
    ) -> Any:
        """A pool of worker processes."""
        return self._classes.Pool(processes, initializer, initargs, maxtasksperchild, context=self)

    def Manager(self) -> Any:
        """A started manager; its proxies carry what they are given."""
        manager = self._classes.SyncManager(ctx=self)
        manager.start()
        return manager

    def get_context(self, method: str | None = None) -> Any:
        """This context, or the one of ours for *method*. Raises: ValueError."""
        return self if method is None else find_context(self._contexts, method)

    def __repr__(self) -> str:
        method: str = self.get_start_method()  # type: ignore[attr-defined]
        return f"<fdshare context {method!r} of {self._family.package}>"

    def __reduce__(self) -> Any:
        return _context_of, (type(self),)


def _context_of(cls: type[ContextMixin]) -> Any:
    return next(context for context in cls._contexts.values() if type(context) is cls)


def find_context(contexts: Mapping[str, Any], method: str) -> Any:
    """The context for that start method. Raises: ValueError: there is none."""
    if method not in contexts:
        raise ValueError(f"cannot find context for {method!r}")
    return contexts[method]


def make_contexts(classes: Classes) -> Mapping[str, Any]:
    """The contexts of *classes*, by start method."""
    family, contexts = classes.family, dict[str, Any]()
    stock = family.module("context")
    for method, prefix in (("fork", "Fork"), ("spawn", "Spawn"), ("forkserver", "ForkServer")):
        name = f"{prefix}Context"
        ours = {"_classes": classes, "_contexts": contexts}
        ours["Process"] = getattr(classes, f"{prefix}Process")
        contexts[method] = family.derive(name, ContextMixin, getattr(stock, name), **ours)()
    return contexts
