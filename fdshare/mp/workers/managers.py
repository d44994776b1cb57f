"""Managers whose server and proxies talk over connections of ours, so they carry descriptors.

Over multiprocessing/managers.py of CPython 3.11 to 3.13, which chooses its Listener and Client by
the name of a serializer (`listener_client`). Ours is one more. Proxies remember the name, and are
pickled with it, so it is a string that brings its registration along.
"""

from __future__ import annotations

import time
from typing import Any, ClassVar

from fdshare.errors import DescriptorLimit
from fdshare.mp.channels.connection import ConnectionMixin, ListenerMixin, make_client
from fdshare.mp.family import Family
from fdshare.mp.workers.tasks import PATIENCE, PAUSE

__all__ = ["ManagerConnectionMixin", "Serializer", "SyncManagerMixin", "register_serializer"]


class Serializer(str):
    """The name of our serializer, registered in every process that unpickles it."""

    connection: Any

    def __reduce__(self) -> Any:
        return register_serializer, (self.connection,)


def register_serializer(connection: Any) -> Serializer:
    """The serializer of managers that talk over the class *connection*, registered here."""
    family = connection._family
    name = Serializer(f"fdshare-{family.package}")
    name.connection = connection
    known = family.module("managers").listener_client
    if name not in known:
        listener = family.derive(
            "ManagerListener",
            ListenerMixin,
            family.module("connection").Listener,
            _connection=connection,
        )
        known[name] = (listener, make_client(family, connection))
    return name


class ManagerConnectionMixin(ConnectionMixin):
    """A connection on which each message is answered: none may be left to be read later."""

    def recv(self: Any) -> Any:
        """The next object. Raises: DescriptorLimit, after some seconds; it is gone then."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                return ConnectionMixin.recv(self)
            except DescriptorLimit:
                if time.monotonic() > deadline:
                    self.discard()
                    raise
            time.sleep(PAUSE)


class SyncManagerMixin:
    """A SyncManager whose objects carry what they are given."""

    _family: ClassVar[Family]
    _connection: ClassVar[Any]

    def __init__(
        self,
        address: Any = None,
        authkey: bytes | None = None,
        serializer: str = "pickle",
        ctx: Any = None,
        **options: Any,
    ) -> None:
        if serializer == "pickle":
            serializer = register_serializer(self._connection)
        super().__init__(address, authkey, serializer, ctx, **options)  # type: ignore[call-arg]
