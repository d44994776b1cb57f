"""The private server of a process tree: no path, no keeper, no owner; it ends when nobody needs it.

Runs in a fresh interpreter of a session of its own (fdshare/mp/private.py starts it), on a listener
that its starter bound. It is needed while a process is connected to it or an entry is held; every
entry of the tree has a time to live, so one whose processes are all gone ends in the end.
"""

from __future__ import annotations

import os
import shutil
import socket
from typing import Final

from fdshare.server.settings import Settings
from fdshare.server.world import Server

__all__ = ["serve_private"]

_LINGER: Final = 1.0  # seconds between looks: whoever comes back in between finds it alive
_BACKLOG: Final = 4096


def serve_private(fd: int, folder: str | None = None) -> None:
    """Serves on the listener *fd*, which it takes over, until nobody needs it; then removes
    *folder*, where its socket has one."""
    _be_alone()
    with socket.socket(fileno=fd) as listener:
        listener.set_inheritable(False)
        # Once more, for SO_PEERCRED names whoever called listen(2) last: the starter may be gone.
        listener.listen(_BACKLOG)
        server = Server(listener, Settings(path="", keeper=False))
        idle = False

        def look(now: float) -> None:
            nonlocal idle
            used = bool(server.loop.connections or len(server.registry))
            if idle and not used:
                server.stop()
            idle = not used
            server.loop.later(_LINGER, look)

        look(0.0)
        try:
            server.run()
        finally:
            server.shut_down()
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)


def _be_alone() -> None:
    """Keeps nothing of the starter's: its standard streams may be pipes that somebody reads to the
    end, its folder a mount that somebody wants to leave."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(nothing, number)
    if nothing > 2:
        os.close(nothing)
    os.chdir("/")
