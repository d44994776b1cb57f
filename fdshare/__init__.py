"""fdshare: share open descriptors between Python processes.

Register a socket, a file or any other descriptor under a name, fetch it by that name from an
unrelated process; send descriptors through the queues, pipes and pools of multiprocessing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fdshare import errors
from fdshare.errors import *  # noqa: F403  # every refusal by its name, for `except fdshare....`
from fdshare.version import __version__

if TYPE_CHECKING:
    from fdshare import aio
    from fdshare.activation import listen_fds, notify
    from fdshare.client.blocking.client import Client, connect
    from fdshare.client.ref import ref
    from fdshare.kernel.descriptor import Descriptor
    from fdshare.kernel.shared_memory import SharedMemory, shared_copy
    from fdshare.kinds import register_kind, unregister_kind
    from fdshare.manager import Manager
    from fdshare.mp.backends import get_context
    from fdshare.mp.executor import ProcessPoolExecutor
    from fdshare.mp.pickling.hold import hold
    from fdshare.mp.pickling.install import install, uninstall

# name -> module. Imported on first use: a program pays for what it uses.
_LAZY = {
    "aio": "fdshare.aio",
    "Client": "fdshare.client.blocking.client",
    "connect": "fdshare.client.blocking.client",
    "Manager": "fdshare.manager",
    "Descriptor": "fdshare.kernel.descriptor",
    "get_context": "fdshare.mp.backends",
    "hold": "fdshare.mp.pickling.hold",
    "install": "fdshare.mp.pickling.install",
    "uninstall": "fdshare.mp.pickling.install",
    "listen_fds": "fdshare.activation",
    "notify": "fdshare.activation",
    "ProcessPoolExecutor": "fdshare.mp.executor",
    "ref": "fdshare.client.ref",
    "register_kind": "fdshare.kinds",
    "SharedMemory": "fdshare.kernel.shared_memory",
    "shared_copy": "fdshare.kernel.shared_memory",
    "unregister_kind": "fdshare.kinds",
}

__all__ = [
    "Client",
    "Descriptor",
    "Manager",
    "ProcessPoolExecutor",
    "SharedMemory",
    "__version__",
    "aio",
    "connect",
    "errors",
    "get_context",
    "hold",
    "install",
    "listen_fds",
    "notify",
    "ref",
    "register_kind",
    "shared_copy",
    "uninstall",
    "unregister_kind",
    *errors.__all__,
]


def __getattr__(name: str) -> Any:
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module 'fdshare' has no attribute {name!r}")
    from importlib import import_module

    found = import_module(module)
    value = found if module == f"fdshare.{name}" else getattr(found, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
