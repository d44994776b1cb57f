"""get_context(), and what we have over each of the two packages, by its name."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Protocol

from fdshare.errors import InvalidArgument
from fdshare.mp.classes import Classes
from fdshare.mp.context import Context, find_context
from fdshare.mp.family import Family

__all__ = ["Backend", "backend_of", "get_context"]


class Backend(Protocol):
    """The modules `on_multiprocessing` and `on_multiprocess`."""

    FAMILY: Family
    CLASSES: Classes
    CONTEXTS: Mapping[str, Context]


def backend_of(package: str) -> Backend:
    """The one over *package*, which it imports. Raises: InvalidArgument: there is none."""
    if package == "multiprocessing":
        from fdshare.mp import on_multiprocessing

        return on_multiprocessing
    if package == "multiprocess":
        from fdshare.mp import on_multiprocess

        return on_multiprocess
    raise InvalidArgument("backend", f"{package!r} is neither multiprocessing nor multiprocess")


def get_context(
    method: str | None = None, *, backend: str | ModuleType = "multiprocessing"
) -> Context:
    """A context for *method* ("fork", "spawn", "forkserver"; None: the backend's default).

    *backend* is "multiprocessing" or "multiprocess", or that module. The context offers everything
    that `backend.get_context(method)` does; sockets, files, connections and every other kind go
    through its pipes, queues, pools and managers. Threads may share the context, and a queue, pool
    or executor of it; one end of a pipe is for one sender and one receiver at a time.

    Raises: ValueError: no such method or backend.

    >>> receiver, sender = fdshare.get_context().Pipe()
    >>> with receiver, sender, open(os.devnull) as file:
    ...     sender.send(["a file", file])
    ...     _, again = receiver.recv()
    >>> with again:
    ...     again.name
    '/dev/null'
    """
    ours = backend_of(backend if isinstance(backend, str) else backend.__name__)
    if method is None:
        method = ours.FAMILY.context._default_context.get_start_method()
    return find_context(ours.CONTEXTS, method)
