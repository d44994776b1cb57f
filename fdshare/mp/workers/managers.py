"""Managers whose server and proxies use our connections, so that they carry descriptors.

Over multiprocessing/managers.py of CPython 3.11 to 3.13, which chooses its Listener and Client by
the name of a serializer (`listener_client`). Ours is one more. Proxies are pickled with the name,
so it is a string that registers the serializer where it is unpickled.

Either end of a manager's connection may be of the package itself, which reads no memory (large.py):
a program of a drop-in may talk to one that is not. So both ends of ours have a name that the other
one can ask for, and which no stock one has: the server the path that is chosen for it, the client
an abstract one, before its first request.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, ClassVar, Final

from fdshare.errors import DescriptorLimit
from fdshare.kernel import system
from fdshare.mp.channels.connection import (
    ClientFunction,
    ConnectionMixin,
    ListenerMixin,
    make_client,
)
from fdshare.mp.family import Family
from fdshare.mp.pickling.bundle import Reduced
from fdshare.mp.stock import Address, Function, StockContext, StockManager, StockProcess
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
            ManagerListenerMixin,
            family.connection.Listener,
            _connection=connection,
        )
        known[name] = (listener, _naming(make_client(family, connection)))
    return name


# What the names of both ends have.
_SERVER: Final = b"-fdshare"
_CLIENT: Final = b"\0fdshare-"
_LONGEST_PATH: Final = 107  # sun_path, unix(7)


class ManagerListenerMixin(ListenerMixin):
    """The Listener of a manager's server, whose path tells that the server is one of ours."""

    _family: ClassVar[Family]

    def __init__(
        self,
        address: Address | None = None,
        family: str | None = None,
        backlog: int = 1,
        authkey: bytes | None = None,
    ) -> None:
        module = self._family.connection
        if address is None and family is None and module.default_family == "AF_UNIX":
            path = module.arbitrary_address("AF_UNIX")
            named = path + os.fsdecode(_SERVER)
            address = named if len(os.fsencode(named)) <= _LONGEST_PATH else path
        super().__init__(address, family, backlog, authkey)


def _naming(client: ClientFunction) -> ClientFunction:
    """*client*, with a name for each connection."""

    def Client(
        address: Address, family: str | None = None, authkey: bytes | None = None
    ) -> ConnectionMixin:
        connection = client(address, family, authkey)
        sock = connection._socket or connection._open()
        if sock is not None and system.LINUX:  # with abstract names
            with suppress(OSError):
                sock.bind(_CLIENT + secrets.token_hex(8).encode())
        return connection

    return Client


def _is_ours(peer: socket.socket) -> bool:
    name = peer.getpeername()
    name = os.fsencode(name) if isinstance(name, str) else name
    return name.startswith(_CLIENT) or name.endswith(_SERVER)


class ManagerConnectionMixin(ConnectionMixin):
    """A connection on which each message has an answer: none may be left to be read later."""

    _knows_peer = False

    def send(self, obj: Any) -> None:
        """As the Connection's."""
        if not self._knows_peer:  # a server has received then, and so its client has its name
            sock = self._socket or self._open()
            if sock is not None and _is_ours(sock):
                self._open_cache()
            self._knows_peer = True
        ConnectionMixin.send(self, obj)

    def recv(self) -> Any:
        """The next object. Raises: DescriptorLimit, after PATIENCE seconds; the object is lost."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                return ConnectionMixin.recv(self)
            except DescriptorLimit:
                if not self._poll(0.0):
                    raise  # a part of it was made when the limit was met, and it is gone
                if time.monotonic() > deadline:
                    self._discard()
                    raise
            time.sleep(PAUSE)


class SyncManagerMixin(StockManager):
    """A SyncManager whose proxies carry descriptors."""

    _family: ClassVar[Family]
    _connection: ClassVar[type[ManagerConnectionMixin]]
    _process: StockProcess | None = None  # the stock start() may raise before it sets it

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

    def start(self, initializer: Function | None = None, initargs: Iterable[Any] = ()) -> None:
        """As the standard one's. If it raises, after a Ctrl-C for instance, no server is left."""
        # The server makes its socket in the directory of this process, which removes it at its end.
        self._family.util.get_temp_dir()
        try:
            super().start(initializer, initargs)
        except BaseException:
            # The server ignores SIGINT, and the end of the program waits for it.
            process = self._process
            if process is not None and process.pid and not hasattr(self, "shutdown"):
                process.kill()
                process.join()
            raise
