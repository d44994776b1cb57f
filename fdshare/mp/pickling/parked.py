"""Parked: the transit of channels that are not ours. A server holds the descriptors until they are
loaded.

All descriptors of one pickle are sent to the server in one request when the pickle is complete,
under a key that nobody can guess; the pickle holds the server's address, that key, and for each
object its kind and the position of its descriptors. The process that loads the pickle takes them
with the first object that needs one. The sender may have ended by then. What nobody loads is closed
when its time to live has passed.

The server is the one that was named, or the private one of the process tree (parking/client.py).
"""

from __future__ import annotations

import os
import pickle
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, NamedTuple, TypeAlias

from msgspec import Raw

from fdshare.errors import (
    AlreadyTaken,
    ClosedDescriptor,
    FdshareError,
    ServerTimeout,
    UntrustedServer,
)
from fdshare.kernel.ancillary import discard_all
from fdshare.kernel.descriptor import Descriptor
from fdshare.kernel.descriptor_limit import first_use
from fdshare.kernel.finaliser import finaliser
from fdshare.kinds import Kind, describe, rebuild
from fdshare.mp.pickling.bundle import Reduced
from fdshare.parking.client import PrivateServer
from fdshare.parking.interface import ParkingServer
from fdshare.parking.private_address import new_address
from fdshare.protocol.names import MAX_ENTRY_DESCRIPTORS

__all__ = [
    "DEFAULT_TTL",
    "Label",
    "Parked",
    "Place",
    "Repeatable",
    "current",
    "dumps_single",
    "forget",
    "load",
    "suggest",
    "use",
]

DEFAULT_TTL: Final = 300.0  # seconds
_TOKEN: Final = 16  # bytes; nobody guesses so many
_PART: Final = struct.Struct(">H")  # of a pickle with more descriptors than an entry may have
_FIRST: Final = _PART.pack(0)
_SINGLE: Final = frozenset({"socket", "descriptor"})


# What all objects of one pickle share: token, address, private, ttl; then an _Arrival.
Label: TypeAlias = list[Any]
Loader: TypeAlias = Callable[[Label, str, bytes, int, int], Any]


class Place(NamedTuple):
    """Where descriptors are parked, for how many seconds at most, and by what they are loaded.

    Each object in a pickle is a call of *loader*, which the pickle names: `install` has one that
    prepares the child that it is called in.
    """

    address: str
    private: bool
    ttl: float
    loader: Loader

    def server(self) -> ParkingServer:
        """The server there. It is this process's for all that it parks: not to be closed."""
        server = _servers.get(self.address)
        if server is None:
            with _lock:
                server = _servers.get(self.address)
                if server is None:
                    server = _servers[self.address] = self._new_server()
        return server

    def _new_server(self) -> ParkingServer:
        if self.private:
            return PrivateServer(self.address)
        # Here and not at the top: it brings the whole client, which most children never need.
        with first_use():
            from fdshare.parking.named import NamedServer

        return NamedServer(self.address)


_lock = threading.Lock()
_servers: dict[str, ParkingServer] = {}
_current: Place | None = None


def _after_fork_in_child() -> None:
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork_in_child)


def use(place: Place | None) -> Place | None:
    """Parks at *place* from now on; returns where it was until now."""
    global _current
    with _lock:
        former, _current = _current, place
    return former


def suggest(place: Place) -> None:
    """Parks at *place* if this process has parked nowhere yet."""
    global _current
    with _lock:
        if _current is None:
            _current = place


def current() -> Place:
    """Where this process parks; chosen now if it was not set."""
    global _current
    if _current is not None:
        return _current
    with _lock:
        if _current is None:
            _current = Place(new_address(), True, DEFAULT_TTL, load)
        return _current


def forget() -> None:
    """Closes this process's connections. A private server that nobody else uses ends soon."""
    with _lock:
        servers = list(_servers.values())
        _servers.clear()
    for server in servers:
        server.close()


def _reached() -> Place:
    """`current()`, when its server has answered.

    Where there can be no private server of ours (once its address was used it is known, and others
    can take it), a new address is made: now, before the address is in a pickle.
    """
    place = current()
    is_new = False
    while place.address not in _servers:
        try:
            place.server().check()
        except BaseException as error:
            # Nobody can take a new address; where it fails, too, the next one would.
            if is_new or not _leaves(place, error):
                with _lock:
                    _servers.pop(place.address, None)
                raise
            place = place._replace(address=new_address())
            is_new = True
            use(place)
    return place


def _leaves(place: Place, error: BaseException) -> bool:
    """True if *error* says that somebody else has our private address: it is looked at again before
    anything else is parked there."""
    if not place.private or not isinstance(error, UntrustedServer | ServerTimeout):
        return False
    with _lock:
        _servers.pop(place.address, None)
    return True


# Sending


class Repeatable:
    """An object whose pickle may be loaded *uses* times."""

    __slots__ = ()
    uses: int


def _new_label(token: bytes, place: Place) -> Label:
    return [token, place.address, place.private, place.ttl]


class _Parcel:
    """The descriptors that are parked together. All objects of the pickle hold the same *label*,
    which the memo pickles once. It is a list: no pickler calls a reducer for it, and the loader can
    append the descriptors that it took."""

    __slots__ = ("fds", "label", "loader", "server", "token", "ttl", "uses")

    def __init__(self, place: Place, uses: int) -> None:
        self.token = os.urandom(_TOKEN)
        self.label = _new_label(self.token, place)
        self.loader = place.loader
        self.server = place.server()
        self.ttl = place.ttl
        self.uses = uses
        self.fds: list[int] = []

    def send(self) -> None:
        """Parks it. If this raises, part of it may be parked."""
        fds = self.fds
        if len(fds) <= MAX_ENTRY_DESCRIPTORS:
            self.server.put(self.token + _FIRST, fds, self.ttl, self.uses)
            return
        for key, first in self._parts():
            part = fds[first : first + MAX_ENTRY_DESCRIPTORS]
            self.server.put(key, part, self.ttl, self.uses)

    def take_back(self) -> None:
        """Removes what was parked; never raises."""
        for key, _ in self._parts():
            # What cannot be removed expires.
            with suppress(FdshareError, OSError):
                self.server.take_back(key)

    def _parts(self) -> list[tuple[bytes, int]]:
        firsts = range(0, len(self.fds), MAX_ENTRY_DESCRIPTORS)
        return [(_key(self.token, number), first) for number, first in enumerate(firsts)]


def _key(token: bytes, part: int) -> bytes:
    return token + _PART.pack(part)


class Parked:
    """A server holds the descriptors of this pickle."""

    __slots__ = ("_holders", "_parcels", "_place")

    def __init__(self) -> None:
        self._place: Place | None = None
        self._parcels: dict[int, _Parcel] = {}
        self._holders: list[tuple[Any, list[int]]] = []

    def carry(self, obj: Any, kind: Kind, fds: list[int]) -> Reduced:
        if self._place is None:
            self._place = _reached()
        uses = obj.uses if isinstance(obj, Repeatable) else 1
        parcel = self._parcels.get(uses)
        if parcel is None:
            parcel = self._parcels[uses] = _Parcel(self._place, uses)
        first = len(parcel.fds)
        parcel.fds += fds
        self._holders.append((obj, fds))
        return parcel.loader, (parcel.label, kind.tag, bytes(kind.spec), first, len(fds))

    def commit(self) -> None:
        parcels = self._parcels.values()
        try:
            try:
                for parcel in parcels:
                    parcel.send()
            finally:
                # Another thread may have closed one meanwhile, and its number may have been reused
                # before it was sent: queues pickle in a thread, `put(s); s.close()` is common.
                for obj, fds in self._holders:
                    _check_open(obj, fds)
        except BaseException as error:
            for parcel in parcels:
                parcel.take_back()
            if self._place is not None:
                _leaves(self._place, error)  # it is in the pickle: the next one is sent elsewhere
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


# Most of what is sent is a socket by itself. The pickles of all sockets of a kind differ in the
# token alone, and pickling would be half of the sender's work.

_templates: Final[dict[int, tuple[Kind, Place, bytes, bytes]]] = {}
_REMEMBERED: Final = 64


def dumps_single(obj: Any) -> bytes | None:
    """The pickle of *obj*, whose descriptor is parked; None if *obj* is not one socket or
    descriptor, to be loaded once. Raises: as `Parked.carry` and `commit`."""
    kind, fds = describe(obj)
    if kind.tag not in _SINGLE or (isinstance(obj, Repeatable) and obj.uses != 1):
        return None
    place = _reached()
    template = _templates.get(id(kind))
    if template is None or template[0] is not kind or template[1] is not place:
        template = _new_template(kind, place)
    token = os.urandom(_TOKEN)
    server = place.server()
    try:
        try:
            server.put(token + _FIRST, fds, place.ttl, 1)
        finally:
            _check_open(obj, fds)  # as in `commit`
    except BaseException as error:
        with suppress(FdshareError, OSError):
            server.take_back(token + _FIRST)
        if isinstance(error, UntrustedServer) and _leaves(place, error):
            return dumps_single(obj)  # at a new address
        raise
    return template[2] + token + template[3]


class _Reduces:
    """Pickles as it is told."""

    def __init__(self, reduced: Reduced) -> None:
        self._reduced = reduced

    def __reduce__(self) -> Reduced:
        return self._reduced


def _new_template(kind: Kind, place: Place) -> tuple[Kind, Place, bytes, bytes]:
    gap = os.urandom(_TOKEN)
    label = _new_label(gap, place)
    reduced = place.loader, (label, kind.tag, bytes(kind.spec), 0, 1)
    head, tail = pickle.dumps(_Reduces(reduced)).split(gap)
    template = kind, place, head, tail
    if len(_templates) >= _REMEMBERED:
        _templates.clear()
    _templates[id(kind)] = template
    return template


# Receiving


def load(label: Label, tag: str, spec: bytes, first: int, count: int) -> Any:
    """The object of *tag* and *spec* with *count* descriptors from position *first* on, of the
    pickle whose parcel has *label*. Pickles name it: do not move or rename.
    """
    if type(label[-1]) is not _Arrival:
        token, address, private, ttl = label
        place = Place(address, private, ttl, load)
        if _current is None and private:
            suggest(place)
        server = _servers.get(address) or place.server()
        if not first:
            taken = server.take(token + _FIRST)
            if len(taken) == count:
                return rebuild(Kind(tag, Raw(spec)), taken)
            label.append(_Arrival(server, token, {0: list(taken)}))
        else:
            label.append(_Arrival(server, token, {}))
    return rebuild(Kind(tag, Raw(spec)), label[-1].claim(first, count))


class _Arrival:
    """The descriptors of the pickle that is being loaded; closes those that no object takes."""

    __slots__ = ("_parts", "_server", "_token")

    def __init__(
        self, server: ParkingServer, token: bytes, parts: dict[int, list[Descriptor | None]]
    ) -> None:
        self._server = server
        self._token = token
        self._parts = parts

    def claim(self, first: int, count: int) -> list[Descriptor]:
        """The *count* descriptors from position *first* on; the caller owns them."""
        claimed: list[Descriptor] = []
        try:
            # In place: those before a failure are to be closed.
            claimed.extend(map(self._claim, range(first, first + count)))
        except BaseException:
            discard_all(claimed)
            raise
        return claimed

    def _claim(self, position: int) -> Descriptor:
        number, index = divmod(position, MAX_ENTRY_DESCRIPTORS)
        part = self._parts.get(number)
        if part is None:
            part = self._parts[number] = list(self._server.take(_key(self._token, number)))
        descriptor = part[index] if index < len(part) else None
        if descriptor is None:
            raise AlreadyTaken(self._token.hex())
        part[index] = None
        return descriptor

    @finaliser
    def __del__(self) -> None:
        for part in self._parts.values():
            discard_all(descriptor for descriptor in part if descriptor is not None)
