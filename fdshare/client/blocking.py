"""Client: the verbs, blocking, from any thread.

A call takes a channel, a connection of its own, from a small pool, so that a wait of an hour blocks
only its caller. Timeouts are the kernel's (SO_RCVTIMEO): a fetch is one sendmsg and one recvmsg.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
import threading
import time
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, Final, TypeVar

import msgspec

from fdshare.client import verbs
from fdshare.client.address import default_path
from fdshare.client.conversation import Answer, Conversation, Exchange, Parts
from fdshare.errors import (
    ClosedDescriptor,
    FdshareError,
    InvalidArgument,
    NoServer,
    ServerGone,
    ServerTimeout,
    UntrustedServer,
)
from fdshare.kernel.ancillary import receive_into, send_message
from fdshare.kernel.credentials import peer_credentials
from fdshare.kernel.descriptor import Descriptor
from fdshare.kernel.endpoint import connect as connect_socket
from fdshare.protocol import messages as m

__all__ = ["Client", "connect"]

T = TypeVar("T")

_POOL: Final = 4  # idle connections kept
_BUFFER: Final = 1 << 16
_TIMEVAL: Final = struct.Struct("@ll")  # struct timeval
_FIRST_PAUSE: Final = 0.005  # seconds between attempts to reconnect, doubled each time ...
_LONGEST_PAUSE: Final = 0.2  # ... up to this


class _Gone(Exception):
    """The connection ended; another one may do."""


class _Channel:
    """One connection to the server, and the conversation that outlives it. For one caller."""

    def __init__(self, address: str, trust: Collection[int], authkey: bytes | None) -> None:
        self._address = address
        self._trust = trust
        self._authkey = authkey
        self._sock: socket.socket | None = None
        self._greeting = b""
        self._conversation = Conversation(authkey)
        self._buffer = bytearray(_BUFFER)
        self._view = memoryview(self._buffer)
        self._kernel_timeout = 0.0
        self.was_open = False

    def open(self, deadline: float | None) -> None:
        """Connects, unless it is connected. The Hello goes out with the first request."""
        if self._sock is not None:
            return
        left = None if deadline is None else max(deadline - time.monotonic(), 0.0)
        sock = connect_socket(self._address, timeout=left)
        try:
            who = peer_credentials(sock)
            if who.uid not in self._trust:
                raise UntrustedServer(self._address, who.uid)
            self._sock = sock
            self._kernel_timeout = 0.0
            self.was_open = True
            self._greeting = self._conversation.hello()
            if self._authkey is not None:
                self._authenticate(deadline)
        except BaseException:
            self._sock = None
            sock.close()
            raise

    def close(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None
            # What was half received belongs to nobody.
            self._conversation.hello()

    def exchange(self, exchange: Exchange, deadline: float | None, id: int) -> Parts:
        """The whole answer to *exchange*. Raises: _Gone, ServerTimeout, or the refusal."""
        try:
            self._send(exchange, id, deadline)
            parts = Parts()
            while True:
                for answer in self._receive(deadline):
                    if self._part_of(answer, id) and parts.add(answer):
                        return parts.finish()
        except BaseException as error:
            # A refusal leaves the connection in order; after anything else an answer may come late.
            if not isinstance(error, FdshareError) or isinstance(
                error, (ConnectionError, ServerTimeout)
            ):
                self.close()
            raise

    def new_id(self) -> int:
        return self._conversation.next_id()

    def _part_of(self, answer: Answer, id: int) -> bool:
        if answer.id == id:
            return True
        for descriptor in answer.descriptors:
            descriptor.close()
        if answer.id == 0 and type(answer.reply) is m.Refused:
            raise m.refusal_error(answer.reply)  # the door, and the reason
        return False

    def _authenticate(self, deadline: float | None) -> None:
        self._write(b"", (), deadline)
        while self._conversation.welcome is None:
            for answer in self._receive(deadline):
                self._part_of(answer, -1)
        self._write(self._conversation.proof(), (), deadline)
        while not (answers := self._receive(deadline)):
            pass
        self._conversation.check_proof(answers[0])

    def _send(self, exchange: Exchange, id: int, deadline: float | None) -> None:
        frame = self._conversation.frame(id, exchange.request, len(exchange.fds))
        self._write(frame, exchange.fds, deadline)

    def _write(self, data: bytes | memoryview, fds: Iterable[int], deadline: float | None) -> None:
        sock = self._connected()
        if self._greeting:
            data, self._greeting = self._greeting + data, b""
        numbers = list(fds)
        while data:
            self._limit(deadline)
            try:
                sent = send_message(sock, (data,), numbers)
            except BlockingIOError:
                self._check_time(deadline)
                continue
            except (BrokenPipeError, ConnectionResetError) as error:
                # What the server said before it closed the door is still there to be read.
                return self._last_words(error, deadline)
            numbers = []
            data = memoryview(data)[sent:]

    def _last_words(self, error: OSError, deadline: float | None) -> None:
        try:
            for answer in self._receive(deadline):
                self._part_of(answer, -1)
        except OSError as reading:
            if isinstance(reading, FdshareError):
                raise
        raise _Gone(str(error)) from None

    def _receive(self, deadline: float | None) -> list[Answer]:
        sock = self._connected()
        while True:
            self._limit(deadline)
            try:
                count, descriptors, lost = receive_into(sock, self._buffer)
                break
            except BlockingIOError:  # the kernel's timeout
                self._check_time(deadline)
            except ConnectionResetError as error:
                raise _Gone(str(error)) from None
        if not count:
            raise _Gone("it closed the connection")
        return self._conversation.feed(self._view[:count], descriptors, lost)

    def _connected(self) -> socket.socket:
        if self._sock is None:
            raise _Gone("not connected")
        return self._sock

    def _check_time(self, deadline: float | None) -> None:
        if deadline is not None and time.monotonic() >= deadline:
            raise ServerTimeout(self._address, 0.0)

    def _limit(self, deadline: float | None) -> None:
        """Sets the kernel's timeouts, unless what is set still fits."""
        assert self._sock is not None
        left = 0.0 if deadline is None else max(deadline - time.monotonic(), 0.001)
        # Waking too early or a little late is harmless, for the deadline is looked at again then;
        # a system call for every request is not.
        if left / 2 <= self._kernel_timeout <= left * 1.5 + 1 and self._kernel_timeout:
            return
        self._kernel_timeout = left or 3600.0
        value = _TIMEVAL.pack(int(self._kernel_timeout), int(self._kernel_timeout % 1 * 1e6))
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)


class Client:
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
        self.address = default_path() if path is None else os.fspath(path)
        self.timeout = timeout
        self.reconnect = reconnect
        self._authkey = None if authkey is None else bytes(authkey)
        self._trust = frozenset((0, os.geteuid()) if trust is None else trust)
        self._closed = False
        self._reset()
        _clients.add(self)

    def _reset(self) -> None:
        """As new; in a forked child, whose copies of the connections are the parent's."""
        self._lock = threading.Lock()
        self._idle: list[_Channel] = []
        self._lifeline: tuple[socket.socket, socket.socket] | None = None

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
    ) -> m.Entry:
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
        lifeline = self._lifeline_end() if lifetime == "connection" else None
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
        return self._do(verbs.fetch(name, timeout))

    def fetch_raw(self, name: str, *, timeout: float | None = 0) -> list[Descriptor]:
        """The bare descriptors of *name*, whatever their kind. The caller owns the result."""
        return self._do(verbs.fetch_raw(name, timeout))

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

    def unregister(self, name: str, *, if_generation: int | None = None) -> None:
        """The server lets go of the entry. Raises: NameNotFound, GenerationMismatch,
        AccessDenied."""
        self._do(verbs.unregister(name, if_generation))

    def rename(self, old: str, new: str) -> m.Entry:
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
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
            lifeline, self._lifeline = self._lifeline, None
        for channel in idle:
            channel.close()
        for end in lifeline or ():
            end.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_lifeline"):
            self.close()

    def __bool__(self) -> bool:
        return True  # an empty server is still one

    def __repr__(self) -> str:
        return f"<Client of {self.address}{' closed' if self._closed else ''}>"

    def __getstate__(self) -> dict[str, Any]:
        if self._authkey is not None and not _spawning():
            raise InvalidArgument(
                "authkey", "a client with one is pickled only while a child is spawned"
            )
        return {
            "path": self.address,
            "authkey": self._authkey,
            "timeout": self.timeout,
            "reconnect": self.reconnect,
            "trust": self._trust,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        Client.__init__(self, state.pop("path"), **state)

    # How a call is made.

    def _do(self, steps: verbs.Steps[T]) -> T:
        try:
            exchange = next(steps)
            channel = self._borrow()
            try:
                while True:
                    exchange = steps.send(self._exchange(channel, exchange))
            finally:
                self._give_back(channel)
        except StopIteration as stop:
            result: T = stop.value
            return result
        except BaseException:
            steps.close()
            raise

    def _exchange(self, channel: _Channel, exchange: Exchange) -> Parts:
        id = channel.new_id()
        wait, request = exchange.wait, exchange.request
        deadline = None
        if self.timeout is not None and wait is not None:
            deadline = time.monotonic() + self.timeout + wait
        name_deadline = time.monotonic() + wait if wait else None
        give_up: float | None = None  # set when the server was first found missing
        pause = _FIRST_PAUSE
        while True:
            try:
                channel.open(deadline)
                return channel.exchange(exchange, deadline, id)
            except (_Gone, NoServer) as error:
                now = time.monotonic()
                if isinstance(error, NoServer) and not channel.was_open:
                    raise
                give_up = give_up or now + self.reconnect
                if now >= give_up or (deadline is not None and now >= deadline):
                    raise ServerGone(self.address, str(error)) from None
                if isinstance(error, NoServer):
                    time.sleep(pause)
                    pause = min(pause * 2, _LONGEST_PAUSE)
            if name_deadline is not None:  # of the wait for a name, only the rest is left
                left = max(name_deadline - time.monotonic(), 0.001)
                exchange.request = msgspec.structs.replace(request, wait=left)

    def _borrow(self) -> _Channel:
        with self._lock:
            if self._closed:
                raise ClosedDescriptor("the client is closed")
            if self._idle:
                return self._idle.pop()
        return _Channel(self.address, self._trust, self._authkey)

    def _give_back(self, channel: _Channel) -> None:
        with self._lock:
            if not self._closed and len(self._idle) < _POOL:
                self._idle.append(channel)
                return
        channel.close()

    def _lifeline_end(self) -> int:
        """The end that goes with entries of lifetime "connection"; the other one is their life."""
        with self._lock:
            if self._lifeline is None:
                self._lifeline = socket.socketpair()
            return self._lifeline[1].fileno()

    def _after_fork(self) -> None:
        """In the child: lets go of the parent's connections and, above all, of its lifeline."""
        idle, lifeline, closed = self._idle, self._lifeline, self._closed
        self._reset()
        self._closed = closed
        for channel in idle:
            channel.close()
        for end in lifeline or ():
            end.close()


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


def _spawning() -> bool:
    """True while multiprocessing, of either family, pickles for a child."""
    for family in ("multiprocessing", "multiprocess"):
        context = sys.modules.get(f"{family}.context")
        if context is not None and context.get_spawning_popen() is not None:
            return True
    return False
