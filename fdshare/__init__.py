"""fdshare: share open descriptors between Python processes.

::

    Under names, through a server that anybody on this machine can reach
      connect             a Client of the server at a path
      Manager             a Client that starts its server, or finds one
      ref                 a Ref: a name to pickle, fetched where it is used
      aio                 the same for asyncio and trio
      Registered, EntryInfo, DescriptorInfo, Explained, ServerStats
                          what the verbs of a client return
      Watcher             yields a Snapshot, then each Event
      Follower            has the object that is registered now

    Through the queues, pipes, pools and executors of multiprocessing
      install, uninstall  the stock ones carry descriptors, or no longer
      hold                duplicates now what a stock channel pickles later
      get_context         a context whose own channels carry descriptors
      ProcessPoolExecutor an executor that carries them

    What is shared
      Descriptor          one open descriptor, owned
      SharedMemory        memory that the other processes map
      shared_copy         a numpy array in such memory
      register_kind, unregister_kind
                          how objects of your own class are shared

    Beside all this
      listen_fds, notify  a service manager: take descriptors, report
      activation          the rest of that: sd_listen_fds(3), sd_notify(3)
      kernel              descriptor passing without a server
      errors              every exception, here under its own name, too
      __version__         the release, as text

What these modules export is public; every other module and name may change in any release.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fdshare import errors
from fdshare.errors import *  # noqa: F403  # every exception by its name, for `except fdshare....`
from fdshare.version import __version__

if TYPE_CHECKING:
    from fdshare import activation, aio, kernel
    from fdshare.activation import listen_fds, notify
    from fdshare.client.blocking.client import Client, connect
    from fdshare.client.blocking.follow import Follower
    from fdshare.client.blocking.watch import Watcher
    from fdshare.client.ref import Ref, ref
    from fdshare.client.watch_state import Snapshot
    from fdshare.kernel.descriptor import Descriptor
    from fdshare.kernel.shared_memory import SharedMemory, shared_copy
    from fdshare.kinds import register_kind, unregister_kind
    from fdshare.manager import Manager
    from fdshare.mp.backends import get_context
    from fdshare.mp.executor import ProcessPoolExecutor
    from fdshare.mp.pickling.hold import hold
    from fdshare.mp.pickling.install import install, uninstall
    from fdshare.protocol.messages import (
        DescriptorInfo,
        EntryInfo,
        Event,
        Explained,
        Registered,
        ServerStats,
    )

# name -> module. Imported on first use: a program pays for what it uses.
_LAZY = {
    "activation": "fdshare.activation",
    "aio": "fdshare.aio",
    "Client": "fdshare.client.blocking.client",
    "connect": "fdshare.client.blocking.client",
    "Descriptor": "fdshare.kernel.descriptor",
    "DescriptorInfo": "fdshare.protocol.messages",
    "EntryInfo": "fdshare.protocol.messages",
    "Event": "fdshare.protocol.messages",
    "Explained": "fdshare.protocol.messages",
    "Follower": "fdshare.client.blocking.follow",
    "get_context": "fdshare.mp.backends",
    "hold": "fdshare.mp.pickling.hold",
    "install": "fdshare.mp.pickling.install",
    "kernel": "fdshare.kernel",
    "listen_fds": "fdshare.activation",
    "Manager": "fdshare.manager",
    "notify": "fdshare.activation",
    "ProcessPoolExecutor": "fdshare.mp.executor",
    "Ref": "fdshare.client.ref",
    "ref": "fdshare.client.ref",
    "register_kind": "fdshare.kinds",
    "Registered": "fdshare.protocol.messages",
    "ServerStats": "fdshare.protocol.messages",
    "SharedMemory": "fdshare.kernel.shared_memory",
    "shared_copy": "fdshare.kernel.shared_memory",
    "Snapshot": "fdshare.client.watch_state",
    "uninstall": "fdshare.mp.pickling.install",
    "unregister_kind": "fdshare.kinds",
    "Watcher": "fdshare.client.blocking.watch",
}

__all__ = [
    "Client",
    "Descriptor",
    "DescriptorInfo",
    "EntryInfo",
    "Event",
    "Explained",
    "Follower",
    "Manager",
    "ProcessPoolExecutor",
    "Ref",
    "Registered",
    "ServerStats",
    "SharedMemory",
    "Snapshot",
    "Watcher",
    "__version__",
    "activation",
    "aio",
    "connect",
    "errors",
    "get_context",
    "hold",
    "install",
    "kernel",
    "listen_fds",
    "notify",
    "ref",
    "register_kind",
    "shared_copy",
    "uninstall",
    "unregister_kind",
    *errors.__all__,
]


if not TYPE_CHECKING:  # a checker is to refuse a name that is not above

    def __getattr__(name: str) -> Any:
        module = _LAZY.get(name)
        if module is None:
            raise AttributeError(f"module 'fdshare' has no attribute {name!r}")
        from importlib import import_module

        try:
            found = import_module(module)
        except ImportError as error:
            if "subinterpreters" not in str(error):
                raise
            raise ImportError(
                f"fdshare.{name} is not available in a sub-interpreter: it needs msgspec, and "
                f"{error}; fdshare.kernel is",
                name=module,
            ) from error
        value = found if module == f"fdshare.{name}" else getattr(found, name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
