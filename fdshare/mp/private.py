"""The private server of a process tree, as its processes see it: an address, and a way to start it.

The address is made up by whoever needs one first; children inherit it, or learn it from what they
are sent. Who finds nobody there binds it and has a server exec'd: of two that try at once bind(2)
lets one through, and the other one's connect(2) waits in the same backlog. The server is no child
of anybody: not of multiprocessing, whose daemons may have none, and not for wait(2).
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import tempfile
from typing import Final

import fdshare
from fdshare.errors import AddressInUse, UnsupportedPlatform
from fdshare.kernel.endpoint import listen

__all__ = ["new_address", "start"]

_PREFIX: Final = "fdshare-private-"


def new_address() -> str:
    """An address that nobody can guess: abstract on Linux, where no file has to be removed when the
    server is killed; elsewhere a path in a new folder of ours."""
    if sys.platform == "linux":
        return f"@{_PREFIX}{secrets.token_hex(16)}"
    return os.path.join(tempfile.mkdtemp(prefix=_PREFIX), "sock")


def start(address: str) -> None:
    """Starts the server at *address*, unless somebody else is doing so.

    A client can connect when this returns; the first answer takes as long as the server's start.
    Raises: UnsupportedPlatform: this Python does not say how to start another; OSError.
    """
    if not sys.executable:
        raise UnsupportedPlatform("a private server", "sys.executable is empty; name a server")
    try:
        listener = listen(address)
    except AddressInUse:
        return
    # detach(): the name is the server's now, and not ours to remove.
    sock, lock = listener.detach()
    try:
        subprocess.run(
            _command(sock.fileno(), address),
            pass_fds=[sock.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=True,
        )
    finally:
        sock.close()
        if lock is not None:
            lock.close()


def _command(fd: int, address: str) -> list[str]:
    """A fresh interpreter that finds what this one finds; what it starts is a grandchild of ours.

    Without `site` (-S), which costs more than the rest of the start, and which this interpreter has
    run: its sys.path is the result.
    """
    root = os.path.dirname(os.path.dirname(os.path.abspath(fdshare.__file__)))
    folder = None if address.startswith("@") else os.path.dirname(address)
    path = [root, *(os.path.abspath(folder) for folder in sys.path if folder)]
    code = (
        "import os, sys\n"
        "if os.fork(): os._exit(0)\n"
        "os.setsid()\n"
        f"sys.path[:] = {path!r}\n"
        "from fdshare.server.private import serve_private\n"
        f"serve_private({fd}, {folder!r})\n"
    )
    return [sys.executable, "-s", "-S", "-c", code]
