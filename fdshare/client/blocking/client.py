"""Client: the verbs, each of which blocks its caller; from any thread.

A call takes a connection of its own from a small pool, so that a wait of an hour blocks only its
caller. Nothing is polled before an answer comes: a fetch is one sendmsg and one recvmsg.
"""

from __future__ import annotations

import os
import socket
import time
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

from fdshare.client import verbs
from fdshare.client.blocking.connection import BlockingConnection, ConnectionLost
from fdshare.client.conversation import Exchange, LeaseEnd, WholeAnswer
from fdshare.client.mapped_page import MappedPage
from fdshare.client.settings import BaseClient, Lifeline
from fdshare.errors import ClosedDescriptor, FdshareError, NameNotFound, ServerTimeout
from fdshare.kernel.at_fork import forget_after_fork
from fdshare.kernel.descriptor import Descriptor
from fdshare.kernel.descriptor_limit import first_use
from fdshare.kernel.finaliser import finaliser
from fdshare.protocol import messages as m

if TYPE_CHECKING:
    from fdshare.client.blocking.follow import Follower
    from fdshare.client.blocking.watch import Watcher

__all__ = ["Client", "connect"]

T = TypeVar("T")

_POOL: Final = 4  # idle connections kept


class Client(BaseClient):
    """The verbs of one server. Thread-safe, fork-safe, picklable (it travels as its address).

    *timeout*: seconds that the server may take to answer, None for ever; the timeout of a verb that
    waits for a name is added. If the server is lost during a call, the client looks for it during
    *reconnect* seconds and repeats the request under its number, so that it happens once.

    *trust*: the uids whose server is trusted; None for one's own and root.
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
        self._page = MappedPage()
        self._followers: weakref.WeakSet[Follower] = weakref.WeakSet()
        self._reset()
        forget_after_fork(self)

    def _reset(self) -> None:
        """No connections and no watches, as when it was made."""
        self._idle: list[BlockingConnection] = []
        self._connections: weakref.WeakSet[BlockingConnection] = weakref.WeakSet()  # all in use
        self._watches: weakref.WeakSet[Watcher] = weakref.WeakSet()

    # The verbs.

    def register(
        self,
        name: str,
        obj: object,
        *,
        replace: bool = False,
        if_generation: int | None = None,
        lifetime: m.Lifetime = "server",
        ttl: float | None = None,
        grace: float = 0.0,
        drop_on_hangup: bool = False,
        metadata: Mapping[str, str] | None = None,
    ) -> m.Registered:
        """The entry that is now registered under *name*.

        The server gets its own copies of *obj*'s descriptors (at most 250). *if_generation*:
        replace that generation alone; 0: only if the name is free. *lifetime*: the entry lives as
        long as the "server", as this "connection" (until the client is closed or its process ends)
        or as this "process", and *grace* seconds more. *ttl*: seconds. *drop_on_hangup*: the entry
        ends when the peer of a socket or pipe hangs up. *metadata*: str to str, 4 KiB in all.

        It is safe to close *obj* after this call. Raises: InvalidName, NameTaken,
        GenerationMismatch, AccessDenied, QuotaExceeded, TooManyDescriptors, UnsupportedKind,
        UnreadData, ClosedDescriptor, DescriptorLimit.

        >>> client.register("null", file, metadata={"by": "me"})
        Registered(name='null', generation=...)
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

        That is a socket.socket, a file object, a Connection, a SharedMemory, a numpy array, a
        Descriptor, or what the `rebuild` of a registered kind returns. Waits up to *timeout*
        seconds for the name to appear, None for ever. The caller owns the result. Raises:
        NameNotFound (no timeout), FetchTimeout, AccessDenied, DescriptorLimit, KindMismatch,
        UnknownKind.

        >>> _ = client.register("null", file)
        >>> with client.fetch("null") as again:
        ...     again.name
        '/dev/null'
        """
        return verbs.given(self._fetch(name, timeout))

    def fetch_raw(self, name: str, *, timeout: float | None = 0) -> list[Descriptor]:
        """The bare descriptors of *name*, whatever their kind. The caller owns the result.

        >>> _ = client.register("null", file)
        >>> [descriptor] = client.fetch_raw("null")
        >>> with descriptor:
        ...     descriptor.fileno() == file.fileno()
        False
        """
        return verbs.given_raw(self._fetch(name, timeout))

    def fetch_many(self, names: Iterable[str]) -> dict[str, Any]:
        """name -> object for all of *names*: one round trip for each 253 descriptors.

        All or nothing: NameNotFound names what is missing. The caller owns the results.

        >>> _ = client.register("null", file)
        >>> for name, again in client.fetch_many(["null"]).items():
        ...     with again:
        ...         name, again.name
        ('null', '/dev/null')
        """
        return self._do(verbs.fetch_many(names))

    def take(self, name: str, *, timeout: float | None = 0) -> Any:
        """As `fetch`, and the entry is removed once this side has the object.

        If this process dies before, the entry is back under its name. The caller owns the result.

        >>> _ = client.register("null", file)
        >>> with client.take("null") as again:
        ...     client.names()
        []
        """
        return self._do(verbs.take(name, timeout))

    def take_raw(self, name: str, *, timeout: float | None = 0) -> list[Descriptor]:
        """As `take`, but the bare descriptors, whatever their kind. The caller owns the result.

        >>> _ = client.register("null", file)
        >>> [descriptor] = client.take_raw("null")
        >>> with descriptor:
        ...     client.names()
        []
        """
        return self._do(verbs.take_raw(name, timeout))

    def wait(self, name: str, *, timeout: float | None = None) -> m.Registered:
        """The entry under *name*, as soon as there is one; no descriptor moves.

        Waits up to *timeout* seconds, None for ever. Raises: FetchTimeout, AccessDenied;
        NameNotFound where *timeout* is 0.

        >>> _ = client.register("null", file)
        >>> client.wait("null", timeout=5).name
        'null'
        """
        return self._do(verbs.wait(name, timeout))

    def watch(self, pattern: str = "*", *, timeout: float | None = None) -> Watcher:
        """An iterator over what changes: first a Snapshot, then each Event, in order.

        *timeout* bounds each wait, in seconds. See `Watcher`. The caller owns the result.

        >>> with client.watch("n*") as watch:
        ...     first = next(watch)
        ...     _ = client.register("null", file)
        ...     first.entries, next(watch).event
        ({}, 'registered')
        """
        with first_use():
            from fdshare.client.blocking.watch import Watcher

        watcher = Watcher(self, pattern, timeout)
        self._watches.add(watcher)
        return watcher

    def follow(
        self,
        name: str,
        *,
        timeout: float | None = 0,
        on_change: Callable[[Any], object] | None = None,
    ) -> Follower:
        """A handle on what is registered under *name*, whose `current` is always the object of now.

        To look takes no system call; after a change the object is fetched anew, the old one is
        closed when nobody has it any more, and *on_change* is called with the new one, by the
        thread that has found it. Wherever the name is missing, waits up to *timeout* seconds for
        it, None for ever. See `Follower`. The caller owns the result. Raises: as `fetch`;
        InvalidArgument.

        >>> _ = client.register("null", file)
        >>> with client.follow("null") as followed, open("/dev/zero") as other:
        ...     before = followed.current.name
        ...     _ = client.register("null", other, replace=True)
        ...     before, followed.current.name
        ('/dev/null', '/dev/zero')
        """
        with first_use():
            from fdshare.client.blocking.follow import Follower

        follower = Follower(self, name, timeout, on_change)
        self._followers.add(follower)
        return follower

    def unregister(self, name: str, *, if_generation: int | None = None) -> None:
        """Removes the entry; the server closes its descriptors.

        Raises: NameNotFound, GenerationMismatch, AccessDenied.

        >>> _ = client.register("null", file)
        >>> client.unregister("null")
        >>> client.names()
        []
        """
        self._do(verbs.unregister(name, if_generation))

    def rename(self, old: str, new: str) -> m.Registered:
        """The entry under its new name, with a new generation; in one step.

        Raises: NameNotFound, NameTaken, AccessDenied.

        >>> _ = client.register("null", file)
        >>> client.rename("null", "nothing").name
        'nothing'
        """
        return self._do(verbs.rename(old, new))

    def bind(
        self, name: str, address: str, *, backlog: int = 4096, reuse_port: bool = False
    ) -> socket.socket:
        """The socket under *name*; if there is none, the server binds *address* and registers it.

        *address*: tcp://HOST:PORT, udp://HOST:PORT, unix:///PATH. Two callers at once get the same
        socket. One whose path is gone is bound anew. The caller owns the result. Raises:
        AddressInUse, InvalidArgument, AccessDenied; KindMismatch: what is registered under *name*
        is not a socket; EndpointError: nobody can connect to it.

        >>> with client.bind("web", "tcp://127.0.0.1:0") as web:
        ...     web.getsockname()[0]
        '127.0.0.1'
        """
        return self._do(verbs.bind(name, address, backlog, reuse_port))

    def names(self, pattern: str = "*") -> list[str]:
        """The names that match the shell pattern, sorted; `*` crosses `/`.

        >>> _ = client.register("null", file)
        >>> client.names("n*")
        ['null']
        """
        return self._do(verbs.names(pattern))

    def info(self, name: str) -> m.EntryInfo:
        """What the server knows of *name*, and the kernel of its descriptors.

        Raises: NameNotFound.

        >>> _ = client.register("null", file)
        >>> info = client.info("null")
        >>> info.registrant.pid == os.getpid(), info.fetches
        (True, 0)
        """
        return self._do(verbs.info(name))

    def infos(self, pattern: str = "*") -> list[m.EntryInfo]:
        """`info` of every entry whose name matches the shell pattern, in the order of names.

        >>> _ = client.register("null", file)
        >>> [info.name for info in client.infos("n*")]
        ['null']
        """
        return self._do(verbs.infos(pattern))

    def explain(
        self, verb: str, name: str, uid: int, gid: int, groups: Iterable[int] = ()
    ) -> m.Explained:
        """Whether the policy allows *verb* on *name* to that user, and the rule that decides.

        >>> client.explain("fetch", "null", os.geteuid(), os.getegid()).allowed
        True
        """
        return self._do(verbs.explain(verb, name, uid, gid, groups))

    def stats(self) -> m.ServerStats:
        """The state of the server: pids, counts, limits.

        >>> _ = client.register("null", file)
        >>> client.stats().names
        1
        """
        return self._do(verbs.stats())

    def ping(self) -> None:
        """Returns when the server has answered.

        >>> client.ping()
        """
        self._do(verbs.simple(m.Ping()))

    def reload(self) -> None:
        """The server reads its policy file again. Raises: PolicyError; the old one stays."""
        self._do(verbs.simple(m.Reload()))

    def upgrade(self) -> None:
        """Returns when the server runs the code that is installed now, with all that it holds.

        The keeper's pid stays. Raises: FdshareError: why not; nothing has changed then.

        >>> before = client.stats().server_pid
        >>> client.upgrade()
        >>> client.stats().server_pid == before
        False
        """
        self._do(verbs.simple(m.Upgrade()))

    def shutdown(self) -> None:
        """Ends the server; it closes all that it holds.

        >>> client.shutdown()
        """
        self._do(verbs.simple(m.Shutdown()))

    # The mapping protocol, on names.

    def __getitem__(self, name: str) -> Any:
        return self.fetch(name)

    def __setitem__(self, name: str, obj: object) -> None:
        self.register(name, obj, replace=True)

    def __delitem__(self, name: str) -> None:
        self.unregister(name)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._do(verbs.holds(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        return len(self.names())

    def keys(self) -> list[str]:
        """The names, sorted: so `dict(client)` fetches everything. The caller owns its values.

        >>> _ = client.register("null", file)
        >>> client.keys()
        ['null']
        """
        return self.names()

    def get(self, name: str, default: Any = None) -> Any:
        """As `fetch`, or *default* where nothing is held. The caller owns the result.

        >>> client.get("null", "there is none")
        'there is none'
        """
        try:
            return self.fetch(name)
        except NameNotFound:
            return default

    def items(self) -> Iterator[tuple[str, Any]]:
        """Each name with its object, if it is still there when its turn comes.

        The caller owns the objects.

        >>> _ = client.register("null", file)
        >>> for name, again in client.items():
        ...     again.close()
        ...     name
        'null'
        """
        for name in self.names():
            try:
                yield name, self.fetch(name)
            except NameNotFound:
                continue

    def values(self) -> Iterator[Any]:
        """The objects of `items`. The caller owns them.

        >>> _ = client.register("null", file)
        >>> for again in client.values():
        ...     again.close()
        """
        return (obj for _, obj in self.items())

    def pop(self, name: str, *default: Any) -> Any:
        """As `take`, or *default*, if it is given, where nothing is held.

        The caller owns the result.

        >>> client.pop("null", None) is None
        True
        """
        try:
            return self.take(name)
        except NameNotFound:
            if not default:
                raise
            return default[0]

    # Its own life.

    def close(self) -> None:
        """Closes the connections, which ends entries of lifetime "connection". Others stay.

        What `follow` gave is closed, too.
        """
        self._closed = True
        for follower in list(self._followers):
            follower.close()
        self._disconnect()

    def _disconnect(self) -> None:
        self._page.close()
        self._close_idle()
        self._lifeline.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @finaliser
    def __del__(self) -> None:
        # Nobody follows any more: a follower has its client.
        if hasattr(self, "_idle"):
            self._disconnect()

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
                    if isinstance(exchange, LeaseEnd):
                        exchange.wait()
                        exchange = steps.send(WholeAnswer())
                        continue
                    try:
                        parts = self._exchange(connection, exchange)
                    except FdshareError as error:
                        exchange = steps.throw(error)
                    else:
                        exchange = steps.send(parts)
            finally:
                self._give_back(connection)
        except StopIteration as stop:
            result: T = stop.value
            return result
        except BaseException:
            steps.close()
            raise

    def _fetch(self, name: str, timeout: float | None) -> WholeAnswer:
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

    def _ask(self, exchange: Exchange, *, search: bool) -> tuple[WholeAnswer, m.Welcome]:
        """For a `Follower`: the answer, and the server that gave it. Without *search* a server that
        is lost is not looked for."""
        try:
            connection = self._idle.pop()
        except IndexError:
            connection = self._new_connection()
        try:
            parts = self._exchange(connection, exchange, self.reconnect if search else 0.0)
            return parts, connection.server
        finally:
            self._give_back(connection)

    def _reaches(self, server: m.Welcome) -> bool:
        """For a `Follower`: whether a connection to *server* is open now."""
        try:
            connection = self._idle.pop()
        except IndexError:
            return False
        try:
            return connection.reaches(server)
        finally:
            self._give_back(connection)

    def _exchange(
        self, connection: BlockingConnection, exchange: Exchange, reconnect: float | None = None
    ) -> WholeAnswer:
        if type(exchange.request) is m.FetchMany:
            parts = connection.fetch(tuple(exchange.request.names), self.timeout)
            if parts is not None:
                return parts
        started = time.monotonic()
        deadline = exchange.deadline(started, self.timeout)
        try:
            try:
                return connection.exchange(exchange, deadline)
            except ConnectionLost:  # or not made yet
                pass  # what the repeat raises is no consequence of this, and is not shown as one
            search = self.reconnect if reconnect is None else reconnect
            return connection.repeat(exchange, started, deadline, search)
        except ServerTimeout:
            assert deadline is not None
            raise ServerTimeout(self.address, deadline - started) from None

    def _new_connection(self) -> BlockingConnection:
        if self._closed:
            raise ClosedDescriptor("the client is closed")
        connection = BlockingConnection(self._dialer, self._authkey, self.timeout)
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
        """In the child: closes its copies of the parent's connections."""
        connections, watches, closed = list(self._connections), list(self._watches), self._closed
        self._reset()
        self._closed = closed
        for connection in connections:  # of threads that are not here, too
            connection.close()
        for watch in watches:
            watch._after_fork()
            self._watches.add(watch)


def connect(
    path: str | os.PathLike[str] | None = None,
    *,
    authkey: bytes | None = None,
    timeout: float | None = 30.0,
    reconnect: float = 2.0,
    trust: Collection[int] | None = None,
) -> Client:
    """A Client of the server at *path*, which has answered.

    *path*: None is `$FDSHARE_PATH`, else `$XDG_RUNTIME_DIR/fdshare.sock`, else /run/fdshare.sock
    for root and /tmp/fdshare-UID/fdshare.sock for others. *authkey* as the server has it; the
    others as for `Client`. The caller owns the result. Raises: NoServer, UntrustedServer,
    AuthenticationFailed, ProtocolError, VersionMismatch, ServerTimeout, EndpointError.

    >>> with fdshare.Manager() as manager, fdshare.connect(manager.address) as client:
    ...     with open(os.devnull) as file:
    ...         client.register("null", file).name
    'null'
    """
    client = Client(path, authkey=authkey, timeout=timeout, reconnect=reconnect, trust=trust)
    try:
        client.ping()
    except BaseException:
        client.close()
        raise
    return client
