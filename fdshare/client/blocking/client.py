"""Client: the verbs, blocking, from any thread.

A call takes a connection of its own from a small pool, so that a wait of an hour blocks only its
caller. Timeouts are the kernel's (SO_RCVTIMEO): a fetch is one sendmsg and one recvmsg.
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, Final, TypeVar

from fdshare.client import verbs
from fdshare.client.blocking.connection import BlockingConnection, ConnectionLost
from fdshare.client.blocking.watch import Watcher
from fdshare.client.conversation import Exchange, Parts
from fdshare.client.settings import BaseClient, Lifeline
from fdshare.errors import ClosedDescriptor, ServerTimeout
from fdshare.kernel.descriptor import Descriptor
from fdshare.protocol import messages as m

__all__ = ["Client", "connect"]

T = TypeVar("T")

_POOL: Final = 4  # idle connections kept


class Client(BaseClient):
    """The verbs of one server. Thread-safe, fork-safe, picklable (it travels as its address).

    *timeout* is how many seconds the server may take to answer, None for ever; the timeout of a
    verb that waits for a name comes on top. A server that is lost in the middle of a call is looked
    for during *reconnect* seconds, and the request repeated under its number: it happens once.

    *trust* are the uids whose server is believed; None for one's own and root.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        authkey: bytes | None = None,
        timeout: float | None = 30.0,
        reconnect: float = 2.0,
        trust: Collection[int] | None = None,
    ) -> None:
        super().__init__(path, authkey=authkey, timeout=timeout, reconnect=reconnect, trust=trust)
        self._lifeline = Lifeline()
        self._reset()
        _clients.add(self)

    def _reset(self) -> None:
        """As new; in a forked child, whose copies of the connections are the parent's."""
        self._idle: list[BlockingConnection] = []
        self._connections: weakref.WeakSet[BlockingConnection] = weakref.WeakSet()  # all in use
        self._watches: weakref.WeakSet[Watcher] = weakref.WeakSet()

    # The verbs.

    def register(
        self,
        name: str,
        obj: Any,
        *,
        replace: bool = False,
        if_generation: int | None = None,
        lifetime: m.Lifetime = "server",
        ttl: float | None = None,
        grace: float = 0.0,
        drop_on_hangup: bool = False,
        metadata: Mapping[str, str] | None = None,
    ) -> m.Registered:
        """The entry that is now held under *name*; the server has its own copies of *obj*'s
        descriptors (at most 250).

        *if_generation* implies *replace*, but only of that generation; 0: only if the name is free.
        *lifetime*: "server", "connection" (until this client is closed or its process ends) or
        "process"; with *grace* seconds more. *ttl*: seconds. *drop_on_hangup*: the entry goes when
        the peer of a socket or pipe does. *metadata*: str to str, 4 KiB in all.

        It is safe to close *obj* after this call. Raises: InvalidName, NameTaken,
        GenerationMismatch, AccessDenied, QuotaExceeded, TooManyDescriptors, UnsupportedKind,
        UnreadData, ClosedDescriptor, DescriptorLimit.
        """
        lifeline = self._lifeline.end() if lifetime == "connection" else None
        return self._do(
            verbs.register(
                name,
                obj,
                replace=replace,
                if_generation=if_generation,
                lifetime=lifetime,
                ttl=ttl,
                grace=grace,
                drop_on_hangup=drop_on_hangup,
                metadata=metadata,
                lifeline=lifeline,
            )
        )

    def fetch(self, name: str, *, timeout: float | None = 0) -> Any:
        """A new object of the kind that was registered under *name*; the entry stays.

        Waits up to *timeout* seconds for the name to appear, None for ever. The caller owns the
        result. Raises: NameNotFound (no timeout), FetchTimeout, AccessDenied, DescriptorLimit,
        KindMismatch, UnknownKind.
        """
        return verbs.given(self._fetch(name, timeout))

    def fetch_raw(self, name: str, *, timeout: float | None = 0) -> list[Descriptor]:
        """The bare descriptors of *name*, whatever their kind. The caller owns the result."""
        return verbs.given_raw(self._fetch(name, timeout))

    def fetch_many(self, names: Iterable[str]) -> dict[str, Any]:
        """name -> object for all of *names*: one round trip for each 253 descriptors.

        All or nothing: NameNotFound names what is missing. The caller owns the results.
        """
        return self._do(verbs.fetch_many(names))

    def take(self, name: str, *, timeout: float | None = 0) -> Any:
        """As `fetch`, and the entry is gone: it is removed when this side has the object, and is
        back under its name if this process dies before. The caller owns the result."""
        return self._do(verbs.take(name, timeout))

    def take_raw(self, name: str, *, timeout: float | None = 0) -> list[Descriptor]:
        """As `take`, but the bare descriptors, whatever their kind. The caller owns the result."""
        return self._do(verbs.take_raw(name, timeout))

    def wait(self, name: str, *, timeout: float | None = None) -> m.Registered:
        """The entry under *name*, as soon as there is one; no descriptor moves.

        Waits up to *timeout* seconds, None for ever. Raises: FetchTimeout, AccessDenied;
        NameNotFound where *timeout* is 0.
        """
        return self._do(verbs.wait(name, timeout))

    def watch(self, pattern: str = "*", *, timeout: float | None = None) -> Watcher:
        """An iterator over what changes: first a Snapshot, then each Event, in order.

        *timeout* bounds each wait, in seconds. See `Watcher`. The caller owns the result.
        """
        watcher = Watcher(self, pattern, timeout)
        self._watches.add(watcher)
        return watcher

    def unregister(self, name: str, *, if_generation: int | None = None) -> None:
        """The server lets go of the entry. Raises: NameNotFound, GenerationMismatch,
        AccessDenied."""
        self._do(verbs.unregister(name, if_generation))

    def rename(self, old: str, new: str) -> m.Registered:
        """The entry under its new name, with a new generation; in one step. Raises: NameNotFound,
        NameTaken, AccessDenied."""
        return self._do(verbs.rename(old, new))

    def bind(
        self, name: str, address: str, *, backlog: int = 4096, reuse_port: bool = False
    ) -> Any:
        """The socket under *name*; if there is none, the server binds *address* and registers it.

        *address*: tcp://HOST:PORT, udp://HOST:PORT, unix:///PATH. Two callers at once get the same
        socket. The caller owns the result. Raises: AddressInUse, InvalidArgument, AccessDenied.
        """
        return self._do(verbs.bind(name, address, backlog, reuse_port))

    def names(self, pattern: str = "*") -> list[str]:
        """The names that match the shell pattern, sorted; `*` crosses `/`."""
        return self._do(verbs.names(pattern))

    def info(self, name: str) -> m.EntryInfo:
        """What is known of *name*, each descriptor as the kernel sees it. Raises: NameNotFound."""
        return self._do(verbs.info(name))

    def infos(self, pattern: str = "*") -> list[m.EntryInfo]:
        """`info` of every entry that matches, in the order of names."""
        return self._do(verbs.infos(pattern))

    def explain(
        self, verb: str, name: str, uid: int, gid: int, groups: Iterable[int] = ()
    ) -> m.Explained:
        """Whether uid *uid* may, and the rule that decides."""
        return self._do(verbs.explain(verb, name, uid, gid, groups))

    def stats(self) -> m.ServerStats:
        """How the server is: pids, counts, limits."""
        return self._do(verbs.stats())

    def ping(self) -> None:
        """Returns when the server has answered."""
        self._do(verbs.simple(m.Ping()))

    def reload(self) -> None:
        """The server reads its policy file again. Raises: PolicyError; the old one stays."""
        self._do(verbs.simple(m.Reload()))

    def upgrade(self) -> None:
        """Returns when the server runs the code that is installed now, with all that it holds; the
        keeper's pid stays. Raises: FdshareError: why not; nothing has changed then."""
        self._do(verbs.simple(m.Upgrade()))

    def shutdown(self) -> None:
        """Ends the server and all that it holds."""
        self._do(verbs.simple(m.Shutdown()))

    # The mapping protocol, on names.

    def __getitem__(self, name: str) -> Any:
        return self.fetch(name)

    def __setitem__(self, name: str, obj: Any) -> None:
        self.register(name, obj, replace=True)

    def __delitem__(self, name: str) -> None:
        self.unregister(name)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._do(verbs.holds(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        return len(self.names())

    # Its own life.

    def close(self) -> None:
        """Closes the connections; entries with lifetime "connection" go. Others stay."""
        self._closed = True
        self._close_idle()
        self._lifeline.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_idle"):
            self.close()

    # How a call is made.

    def _do(self, steps: verbs.Steps[T]) -> T:
        try:
            exchange = next(steps)
            try:
                connection = self._idle.pop()  # atomic, without a lock
            except IndexError:
                connection = self._new_connection()
            try:
                while True:
                    exchange = steps.send(self._exchange(connection, exchange))
            finally:
                self._give_back(connection)
        except StopIteration as stop:
            result: T = stop.value
            return result
        except BaseException:
            steps.close()
            raise

    def _fetch(self, name: str, timeout: float | None) -> Parts:
        """As `_do`, for a fetch, which takes one exchange and not even a generator."""
        try:
            connection = self._idle.pop()
        except IndexError:
            connection = self._new_connection()
        try:
            if timeout == 0 and type(name) is str:
                parts = connection.fetch(name, self.timeout)
                if parts is not None:
                    return parts
            return self._exchange(connection, verbs.asking(name, timeout))
        finally:
            self._give_back(connection)

    def _exchange(self, connection: BlockingConnection, exchange: Exchange) -> Parts:
        started = time.monotonic()
        deadline = exchange.deadline(started, self.timeout)
        try:
            try:
                return connection.exchange(exchange, deadline)
            except ConnectionLost:  # or not made yet
                return connection.repeat(exchange, started, deadline, self.reconnect)
        except ServerTimeout:
            assert deadline is not None
            raise ServerTimeout(self.address, deadline - started) from None

    def _new_connection(self) -> BlockingConnection:
        if self._closed:
            raise ClosedDescriptor("the client is closed")
        connection = BlockingConnection(self._dialer, self._authkey)
        self._connections.add(connection)
        return connection

    def _give_back(self, connection: BlockingConnection) -> None:
        if len(self._idle) >= _POOL:
            connection.close()
            return
        self._idle.append(connection)
        if self._closed:  # perhaps since we looked
            self._close_idle()

    def _close_idle(self) -> None:
        while True:
            try:
                connection = self._idle.pop()
            except IndexError:
                return
            connection.close()

    def _after_fork(self) -> None:
        """In the child: lets go of the parent's connections."""
        connections, watches, closed = list(self._connections), list(self._watches), self._closed
        self._reset()
        self._closed = closed
        for connection in connections:  # of threads that are not here, too
            connection.close()
        for watch in watches:
            watch._after_fork()
            self._watches.add(watch)


_clients: weakref.WeakSet[Client] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for client in list(_clients):
        client._after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)


def connect(
    path: str | os.PathLike[str] | None = None,
    *,
    authkey: bytes | None = None,
    timeout: float | None = 30.0,
    reconnect: float = 2.0,
    trust: Collection[int] | None = None,
) -> Client:
    """A Client of the server at *path* (see `default_path`), after a first word with it.

    The caller owns the result. Raises: NoServer, UntrustedServer, AuthenticationFailed,
    ProtocolError, VersionMismatch, ServerTimeout, EndpointError.
    """
    client = Client(path, authkey=authkey, timeout=timeout, reconnect=reconnect, trust=trust)
    try:
        client.ping()
    except BaseException:
        client.close()
        raise
    return client
