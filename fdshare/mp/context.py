"""A multiprocessing context whose channels carry descriptors.

Derived from multiprocessing/context.py of CPython 3.11 to 3.13: each context is the package's own,
with our Pipe, Queue, JoinableQueue, SimpleQueue, Pool, Manager and Process. Locks, events, values,
arrays and everything else are the package's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from fdshare.mp.classes import Classes
from fdshare.mp.family import Family
from fdshare.mp.pickling.bundle import Reduced
from fdshare.mp.stock import StockContext

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.managers import SyncManager
    from multiprocessing.pool import Pool
    from multiprocessing.process import BaseProcess
    from multiprocessing.queues import JoinableQueue, Queue, SimpleQueue

__all__ = ["Context", "find_context", "make_contexts"]


class Context(StockContext):
    """A context whose channels carry descriptors. For a type checker all that it makes is of the
    documented classes of multiprocessing, whose methods it has."""

    _family: ClassVar[Family]
    _classes: ClassVar[Classes]
    _contexts: ClassVar[Mapping[str, Context]]  # method -> the one of ours over the same package
    Process: ClassVar[type[BaseProcess]]

    def Pipe(self, duplex: bool = True) -> tuple[Connection[Any, Any], Connection[Any, Any]]:
        """Two connections, the ends of one pipe: (reader, writer) where not *duplex*."""
        return self._classes.Pipe(duplex)

    def Queue(self, maxsize: int = 0) -> Queue[Any]:
        """A queue; *maxsize* 0 is no limit."""
        return self._classes.Queue(maxsize, ctx=self)

    def JoinableQueue(self, maxsize: int = 0) -> JoinableQueue[Any]:
        """A queue with task_done() and join()."""
        return self._classes.JoinableQueue(maxsize, ctx=self)

    def SimpleQueue(self) -> SimpleQueue[Any]:
        """A queue without a thread; put() waits while it is full."""
        return self._classes.SimpleQueue(ctx=self)

    def Pool(
        self,
        processes: int | None = None,
        initializer: Callable[..., object] | None = None,
        initargs: Iterable[Any] = (),
        maxtasksperchild: int | None = None,
    ) -> Pool:
        """A pool of worker processes."""
        return self._classes.Pool(processes, initializer, initargs, maxtasksperchild, context=self)

    def Manager(self) -> SyncManager:
        """A started manager; its proxies carry descriptors."""
        manager = self._classes.SyncManager(ctx=self)
        manager.start()
        return manager

    def get_context(self, method: str | None = None) -> Context:  # type: ignore[override]
        """This context, or the one of ours for *method*. Raises: ValueError."""
        return self if method is None else find_context(self._contexts, method)

    def __repr__(self) -> str:
        return f"<fdshare context {self._name!r} of {self._family.package}>"

    def __reduce__(self) -> Reduced:
        return _context_of, (type(self),)


def _context_of(cls: type[Context]) -> Context:
    return next(context for context in cls._contexts.values() if type(context) is cls)


def find_context(contexts: Mapping[str, Context], method: str) -> Context:
    """The context for that start method. Raises: ValueError: there is none."""
    if method not in contexts:
        raise ValueError(f"cannot find context for {method!r}")
    return contexts[method]


def make_contexts(classes: Classes) -> Mapping[str, Context]:
    """The contexts of *classes*, by start method."""
    derive, stock, contexts = classes.family.derive, classes.family.context, dict[str, Context]()
    for method, name, base, process in (
        ("fork", "ForkContext", stock.ForkContext, classes.ForkProcess),
        ("spawn", "SpawnContext", stock.SpawnContext, classes.SpawnProcess),
        ("forkserver", "ForkServerContext", stock.ForkServerContext, classes.ForkServerProcess),
    ):
        ours = {"_classes": classes, "_contexts": contexts, "Process": process}
        contexts[method] = derive(name, Context, base, **ours)()
    return contexts
