"""What a process knows of its own sends and reads on a channel, a forked child forgets.

A thread may be in the middle of a message while another one forks. The child has a copy of what has
begun, but the parent goes on with it: if the child did, too, the stream would be out of step. The
hooks of `multiprocessing.util` are not called by os.fork() itself, so they are not enough.
"""

from __future__ import annotations

import os
import weakref
from typing import Final, Protocol

__all__ = ["forget_after_fork"]


class _Forgetful(Protocol):
    def _forget(self) -> None:
        """Forgets what the parent goes on with, and closes this process's copies of it."""


_channels: Final[set[weakref.ref[_Forgetful]]] = set()


def forget_after_fork(channel: _Forgetful) -> None:
    """Has *channel* forget in each forked child. May be called again."""
    _channels.add(weakref.ref(channel, _channels.discard))


def _forget_all() -> None:
    for found in _channels.copy():
        channel = found()
        if channel is not None:
            channel._forget()


os.register_at_fork(after_in_child=_forget_all)
