"""Managers whose server and proxies use our connections, so that they carry descriptors.

Over multiprocessing/managers.py of CPython 3.11 to 3.13, which chooses its Listener and Client by
the name of a serializer (`listener_client`). Ours is one more. Proxies are pickled with the name,
so it is a string that registers the serializer where it is unpickled.
"""

from __future__ import annotations

import time
from typing import Any, ClassVar

from fdshare.errors import DescriptorLimit
from fdshare.mp.channels.connection import ConnectionMixin, ListenerMixin, make_client
from fdshare.mp.family import Family
from fdshare.mp.pickling.bundle import Reduced
from fdshare.mp.stock import Address, StockContext, StockManager
from fdshare.mp.workers.tasks import PATIENCE, PAUSE

__all__ = ["ManagerConnectionMixin", "Serializer", "SyncManagerMixin", "register_serializer"]


class Serializer(str):
    """The name of our serializer, registered in every process that unpickles it."""

    connection: type[ManagerConnectionMixin]

    def __reduce__(self) -> Reduced:
        return register_serializer, (self.connection,)


def register_serializer(connection: type[ManagerConnectionMixin]) -> Serializer:
    """The serializer of managers that talk over the class *connection*, registered here."""
    family = connection._family
    name = Serializer(f"fdshare-{family.package}")
    name.connection = connection
    known = family.managers.listener_client
    if name not in known:
        listener = family.derive(
            "ManagerListener",
            ListenerMixin,
            family.connection.Listener,
            _connection=connection,
        )
        known[name] = (listener, make_client(family, connection))
    return name


class ManagerConnectionMixin(ConnectionMixin):
    """A connection on which each message has an answer: none may be left to be read later."""

    def recv(self) -> Any:
        """The next object. Raises: DescriptorLimit, after PATIENCE seconds; the object is lost."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                return ConnectionMixin.recv(self)
            except DescriptorLimit:
                if time.monotonic() > deadline:
                    self._discard()
                    raise
            time.sleep(PAUSE)


class SyncManagerMixin(StockManager):
    """A SyncManager whose proxies carry descriptors."""

    _family: ClassVar[Family]
    _connection: ClassVar[type[ManagerConnectionMixin]]

    def __init__(
        self,
        address: Address | None = None,
        authkey: bytes | None = None,
        serializer: str = "pickle",
        ctx: StockContext | None = None,
        *,
        shutdown_timeout: float = 1.0,
    ) -> None:
        if serializer == "pickle":
            serializer = register_serializer(self._connection)
        super().__init__(address, authkey, serializer, ctx, shutdown_timeout=shutdown_timeout)
