"""What an object knows that is its process's own, a forked child forgets.

A thread of the parent may hold a lock, or be in the middle of a message, and it is not in the
child; a descriptor that the child has a copy of stays open until that is closed. The hooks of
`multiprocessing.util` are not called by os.fork() itself, so they are not enough.
"""

from __future__ import annotations

import os
import weakref
from typing import Final, Protocol

__all__ = ["forget_after_fork"]


class _Forgetful(Protocol):
    def _after_fork(self) -> None:
        """Forgets what the parent goes on with, and closes this process's copies of it."""


_objects: Final[set[weakref.ref[_Forgetful]]] = set()


def forget_after_fork(obj: _Forgetful) -> None:
    """Has *obj* forget in each forked child, as long as it is there. May be called again."""
    _objects.add(weakref.ref(obj, _objects.discard))


def _forget_all() -> None:
    """Raises: the first error, when all have forgotten what they can: a handler may raise here."""
    failed: BaseException | None = None
    for found in _objects.copy():
        obj = found()
        if obj is None:
            continue
        try:
            obj._after_fork()
        except BaseException as error:
            failed = failed or error
    if failed is not None:
        raise failed


os.register_at_fork(after_in_child=_forget_all)
