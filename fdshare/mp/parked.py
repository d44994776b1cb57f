"""Parked: the transit of channels that are not ours. A server holds the descriptors meanwhile.

All descriptors of one pickle go to the server in one request when the pickle is complete, under a
name that nobody can guess; the pickle holds the server's address, that name, and for each object
its kind and the position of its descriptors. Whoever loads it `take`s the entry with the first
object that needs it. The sender may be gone by then. What nobody loads is let go when its time to
live has passed.

The server is the one that was named, or the private one of the process tree (private.py).
"""

from __future__ import annotations

import os
import random
import threading
from typing import Any, Final, NamedTuple

from msgspec import Raw, msgpack

from fdshare.client.blocking import Client
from fdshare.errors import (
    AccessDenied,
    AlreadyTaken,
    ClosedDescriptor,
    FdshareError,
    NameNotFound,
    NameTaken,
    NoServer,
    ServerGone,
    UntrustedServer,
)
from fdshare.kernel.ancillary import close_all
from fdshare.kernel.descriptor import Descriptor
from fdshare.kinds import Kind, describers, rebuild
from fdshare.mp.private import new_address, start
from fdshare.mp.transit import Reduced
from fdshare.protocol.names import MAX_ENTRY_DESCRIPTORS

__all__ = [
    "DEFAULT_TTL",
    "Parked",
    "Rendezvous",
    "Repeatable",
    "current",
    "forget",
    "suggest",
    "use",
]

DEFAULT_TTL: Final = 300.0  # seconds
_STARTS: Final = 3  # attempts to start a private server that ends as we come to it
_RECONNECT: Final = 0.1  # seconds; what a dead private server held is gone, so why look for it


class Rendezvous(NamedTuple):
    """Where descriptors are parked, for how many seconds at most, and whether `install` said so."""

    address: str
    private: bool
    ttl: float
    armed: bool = False

    def client(self) -> Client:
        """This process's client there; not ours alone, so never closed."""
        with _lock:
            client = _clients.get(self.address)
            if client is None:
                reconnect = _RECONNECT if self.private else 2.0
                client = _clients[self.address] = Client(self.address, reconnect=reconnect)
            return client

    def park(self, name: str, cargo: _Cargo) -> None:
        """The server holds *cargo* under *name*, which is new, when this returns."""
        client = self.client()
        for attempt in range(_STARTS):
            try:
                client.register(name, cargo, ttl=self.ttl)
                return
            except (NoServer, ServerGone):
                if not self.private or attempt == _STARTS - 1:
                    raise
                start(self.address)
            except NameTaken:
                if not attempt:
                    raise
                return  # it was ours, and the answer was lost

    def take(self, name: str) -> list[Descriptor]:
        """The descriptors under *name*, which is free then. Raises: AlreadyTaken."""
        try:
            return self.client().take_raw(name)
        except NameNotFound:
            raise AlreadyTaken(name) from None
        except (NoServer, ServerGone):
            if not self.private:
                raise
            raise AlreadyTaken(name) from None


_lock = threading.Lock()
_clients: dict[str, Client] = {}
_current: Rendezvous | None = None


def _after_fork_in_child() -> None:
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork_in_child)


def use(rendezvous: Rendezvous | None) -> Rendezvous | None:
    """Parks at *rendezvous* from now on; returns where it was until now."""
    global _current
    with _lock:
        former, _current = _current, rendezvous
    return former


def suggest(rendezvous: Rendezvous) -> None:
    """Parks at *rendezvous* if this process has parked nowhere yet."""
    global _current
    with _lock:
        if _current is None:
            _current = rendezvous


def current() -> Rendezvous:
    """Where this process parks; made up now if nobody has said."""
    global _current
    with _lock:
        if _current is None:
            _current = Rendezvous(new_address(), True, DEFAULT_TTL)
        return _current


def forget() -> None:
    """Closes this process's connections. A private server that nobody else uses ends soon."""
    with _lock:
        clients = list(_clients.values())
        _clients.clear()
    for client in clients:
        client.close()


def _reached() -> Rendezvous:
    """`current()`, where a server answers now.

    Somebody else's server on a private address of ours (the name is known once it was used) is a
    reason to make up another one, which must be before the address is written into a pickle.
    """
    rendezvous = current()
    while rendezvous.address not in _clients:
        client = rendezvous.client()
        try:
            for attempt in range(_STARTS):
                try:
                    client.ping()
                    break
                except (NoServer, ServerGone):
                    if not rendezvous.private or attempt == _STARTS - 1:
                        raise
                    start(rendezvous.address)
        except BaseException as error:
            _clients.pop(rendezvous.address, None)
            client.close()
            if not rendezvous.private or not isinstance(error, UntrustedServer | AccessDenied):
                raise
            rendezvous = rendezvous._replace(address=new_address())
            use(rendezvous)
    return rendezvous


# Sending


class Repeatable:
    """An object whose pickle may be loaded *uses* times."""

    __slots__ = ()
    uses: int


class _Cargo:
    """Descriptors on their way to the server: its kind says nothing of what they are."""

    __slots__ = ("fds",)

    def __init__(self, fds: list[int]) -> None:
        self.fds = fds


_CARGO: Final = Kind("parcel", Raw(msgpack.encode(None)))
describers[_Cargo] = lambda cargo: (_CARGO, cargo.fds)


class _Parcel:
    """What the tickets of one pickle have in common; pickled once, by way of the memo."""

    __slots__ = ("fds", "rendezvous", "token", "uses")

    def __init__(self, rendezvous: Rendezvous, uses: int) -> None:
        self.rendezvous = rendezvous
        self.token = os.urandom(16).hex()
        self.uses = uses
        self.fds: list[int] = []

    def __reduce__(self) -> Reduced:
        return _open, (self.token, self.uses, *self.rendezvous)

    def send(self, sent: list[str]) -> None:
        """Parks what it holds; *sent* gets the names."""
        for start_at in range(0, len(self.fds), MAX_ENTRY_DESCRIPTORS):
            cargo = _Cargo(self.fds[start_at : start_at + MAX_ENTRY_DESCRIPTORS])
            name = _name(self.token, start_at // MAX_ENTRY_DESCRIPTORS)
            for use_number in range(self.uses):
                full = name if self.uses == 1 else f"{name}/{use_number}"
                self.rendezvous.park(full, cargo)
                sent.append(full)

    def take_back(self, names: list[str]) -> None:
        """Unregisters those of *names* that are its own; never raises."""
        try:
            for name in names:
                if self.token in name:
                    self.rendezvous.client().unregister(name)
        except FdshareError:
            pass  # the server has gone, or they will when their time has passed


def _name(token: str, part: int) -> str:
    return f"parcel/{token}.{part}"


class Parked:
    """A server holds the descriptors of this pickle."""

    __slots__ = ("_holders", "_parcels", "_rendezvous")

    def __init__(self) -> None:
        self._rendezvous: Rendezvous | None = None
        self._parcels: dict[int, _Parcel] = {}
        self._holders: list[tuple[Any, list[int]]] = []

    def carry(self, obj: Any, kind: Kind, fds: list[int]) -> Reduced:
        if self._rendezvous is None:
            self._rendezvous = _reached()
        uses = obj.uses if isinstance(obj, Repeatable) else 1
        parcel = self._parcels.get(uses)
        if parcel is None:
            parcel = self._parcels[uses] = _Parcel(self._rendezvous, uses)
        first = len(parcel.fds)
        parcel.fds += fds
        self._holders.append((obj, fds))
        return _arrive, (parcel, kind.tag, bytes(kind.spec), first, len(fds))

    def commit(self) -> None:
        sent: list[str] = []
        try:
            for parcel in self._parcels.values():
                parcel.send(sent)
            # A thread that closed one meanwhile may have had its number used again before it was
            # sent: queues pickle in a thread, and `put(s); s.close()` is a common mistake.
            for obj, fds in self._holders:
                _check_open(obj, fds)
        except BaseException:
            for parcel in self._parcels.values():
                parcel.take_back(sent)
            raise
        finally:
            self.rollback()

    def rollback(self) -> None:
        self._parcels.clear()
        self._holders.clear()


def _check_open(obj: Any, fds: list[int]) -> None:
    fileno = getattr(obj, "fileno", None)
    if fileno is None or len(fds) != 1:
        return
    try:
        if fileno() == fds[0]:
            return
    except (OSError, ValueError):
        pass
    raise ClosedDescriptor(
        f"the {type(obj).__qualname__} was closed while it was pickled; "
        "fdshare.hold(obj) lets you close it straight after"
    )


# Receiving. Every pickle names the next two functions: do not move or rename.


def _open(token: str, uses: int, address: str, private: bool, ttl: float, armed: bool) -> _Arrival:
    rendezvous = Rendezvous(address, private, ttl, armed)
    if _current is None or (armed and not _current.armed):
        # Here and not at the top: only a process that was started unarmed needs it.
        from fdshare.mp.install import arm_child

        arm_child(rendezvous)
    return _Arrival(rendezvous, token, uses)


def _arrive(arrival: _Arrival, tag: str, spec: bytes, first: int, count: int) -> Any:
    return rebuild(Kind(tag, Raw(spec)), arrival.claim(first, count))


class _Arrival:
    """The descriptors of the pickle that is being loaded; closes those that nothing claims."""

    __slots__ = ("_parts", "_rendezvous", "_token", "_uses")

    def __init__(self, rendezvous: Rendezvous, token: str, uses: int) -> None:
        self._rendezvous = rendezvous
        self._token = token
        self._uses = uses
        self._parts: dict[int, list[Descriptor | None]] = {}

    def claim(self, first: int, count: int) -> list[Descriptor]:
        """The *count* descriptors from position *first* on; the caller owns them."""
        claimed: list[Descriptor] = []
        try:
            for position in range(first, first + count):
                part, index = divmod(position, MAX_ENTRY_DESCRIPTORS)
                if part not in self._parts:
                    self._parts[part] = list(self._fetch(part))
                descriptor = self._parts[part][index]
                if descriptor is None:
                    raise AlreadyTaken(_name(self._token, part))
                self._parts[part][index] = None
                claimed.append(descriptor)
        except BaseException:
            close_all(claimed)
            raise
        return claimed

    def _fetch(self, part: int) -> list[Descriptor]:
        name = _name(self._token, part)
        if self._uses == 1:
            return self._rendezvous.take(name)
        while True:
            # One use, one entry: a loader that dies before it has confirmed gives its use back.
            left = self._left(f"{name}/*")
            if not left:
                raise AlreadyTaken(name)
            try:
                return self._rendezvous.take(random.choice(left))
            except AlreadyTaken:
                continue  # somebody was faster

    def _left(self, pattern: str) -> list[str]:
        try:
            return self._rendezvous.client().names(pattern)
        except (NoServer, ServerGone):
            if not self._rendezvous.private:
                raise
            return []

    def __del__(self) -> None:
        for part in self._parts.values():
            close_all(descriptor for descriptor in part if descriptor is not None)
