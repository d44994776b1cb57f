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
import pickle
import struct
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Final, NamedTuple, Protocol, TypeAlias

from msgspec import Raw

from fdshare.errors import (
    AccessDenied,
    AlreadyTaken,
    ClosedDescriptor,
    FdshareError,
    UntrustedServer,
)
from fdshare.kernel.ancillary import close_all
from fdshare.kernel.descriptor import Descriptor
from fdshare.kinds import Kind, describe, rebuild
from fdshare.mp.pickling.bundle import Reduced
from fdshare.parking.client import PrivateServer, new_address
from fdshare.protocol.names import MAX_ENTRY_DESCRIPTORS

__all__ = [
    "DEFAULT_TTL",
    "Parked",
    "Rendezvous",
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


Loader: TypeAlias = Callable[[list[Any], str, bytes, int, int], Any]


class Depot(Protocol):
    """Keeps descriptors under a key of 18 bytes that nobody can guess. Thread-safe, fork-safe."""

    def check(self) -> None:
        """Makes sure that it is there and can be trusted."""

    def put(self, key: bytes, fds: Sequence[int], ttl: float, uses: int) -> None:
        """It has copies of *fds* (at most 250) when this returns, and gives them *uses* times."""

    def take(self, key: bytes) -> list[Descriptor]:
        """What was put; the caller owns it. Raises: AlreadyTaken."""

    def take_back(self, key: bytes) -> None:
        """Nothing is under *key* any more."""

    def close(self) -> None:
        """Closes this process's connections."""


class Rendezvous(NamedTuple):
    """Where descriptors are parked, for how many seconds at most, and by what they are loaded.

    Each object in a pickle is a call of *loader*, which the pickle names: `install` has one that
    prepares the child that it is called in.
    """

    address: str
    private: bool
    ttl: float
    loader: Loader

    def depot(self) -> Depot:
        """This process's way there; not ours alone, so never closed."""
        depot = _depots.get(self.address)
        if depot is None:
            with _lock:
                depot = _depots.get(self.address)
                if depot is None:
                    depot = _depots[self.address] = self._new_depot()
        return depot

    def _new_depot(self) -> Depot:
        if self.private:
            return PrivateServer(self.address)
        # Here and not at the top: it brings the whole client, which most children never need.
        from fdshare.parking.named import NamedServer

        return NamedServer(self.address)


_lock = threading.Lock()
_depots: dict[str, Depot] = {}
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
    if _current is not None:
        return _current
    with _lock:
        if _current is None:
            _current = Rendezvous(new_address(), True, DEFAULT_TTL, load)
        return _current


def forget() -> None:
    """Closes this process's connections. A private server that nobody else uses ends soon."""
    with _lock:
        depots = list(_depots.values())
        _depots.clear()
    for depot in depots:
        depot.close()


def _reached() -> Rendezvous:
    """`current()`, where the right server answers.

    Somebody else's server on a private address of ours (the name is known once it was used) is a
    reason to make up another one, which must be before the address is written into a pickle.
    """
    rendezvous = current()
    while rendezvous.address not in _depots:
        try:
            rendezvous.depot().check()
        except BaseException as error:
            with _lock:
                _depots.pop(rendezvous.address, None)
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


def _new_label(token: bytes, rendezvous: Rendezvous) -> list[Any]:
    return [token, rendezvous.address, rendezvous.private, rendezvous.ttl]


class _Parcel:
    """What is parked together. *label* is what all its tickets hold, pickled once by way of the
    memo: a list, for which no pickler asks anybody, and to which the loader adds what it took."""

    __slots__ = ("depot", "fds", "label", "loader", "token", "ttl", "uses")

    def __init__(self, rendezvous: Rendezvous, uses: int) -> None:
        self.token = os.urandom(_TOKEN)
        self.label = _new_label(self.token, rendezvous)
        self.loader = rendezvous.loader
        self.depot = rendezvous.depot()
        self.ttl = rendezvous.ttl
        self.uses = uses
        self.fds: list[int] = []

    def send(self) -> None:
        """Parks it. If this raises, part of it may be parked."""
        fds = self.fds
        if len(fds) <= MAX_ENTRY_DESCRIPTORS:
            self.depot.put(self.token + _FIRST, fds, self.ttl, self.uses)
            return
        for key, first in self._parts():
            part = fds[first : first + MAX_ENTRY_DESCRIPTORS]
            self.depot.put(key, part, self.ttl, self.uses)

    def take_back(self) -> None:
        """Lets go of what was parked; never raises."""
        for key, _ in self._parts():
            # What fails here goes when its time has passed.
            with suppress(FdshareError, OSError):
                self.depot.take_back(key)

    def _parts(self) -> list[tuple[bytes, int]]:
        firsts = range(0, len(self.fds), MAX_ENTRY_DESCRIPTORS)
        return [(_key(self.token, number), first) for number, first in enumerate(firsts)]


def _key(token: bytes, part: int) -> bytes:
    return token + _PART.pack(part)


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
        return parcel.loader, (parcel.label, kind.tag, bytes(kind.spec), first, len(fds))

    def commit(self) -> None:
        parcels = self._parcels.values()
        try:
            try:
                for parcel in parcels:
                    parcel.send()
            finally:
                # A thread that closed one meanwhile may have had its number used again before it
                # was sent: queues pickle in a thread, `put(s); s.close()` is a common mistake.
                for obj, fds in self._holders:
                    _check_open(obj, fds)
        except BaseException:
            for parcel in parcels:
                parcel.take_back()
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


# A socket by itself is what is put into queues most. Its pickle is the same for all of a kind, but
# for the token, and making it anew would be half of the sender's work.

_templates: Final[dict[int, tuple[Kind, Rendezvous, bytes, bytes]]] = {}
_REMEMBERED: Final = 64


def dumps_single(obj: Any) -> bytes | None:
    """The pickle of *obj* alone, which is parked; None where it is not one socket or descriptor, to
    be loaded once. Raises: as `Parked.carry` and `commit` do."""
    kind, fds = describe(obj)
    if kind.tag not in _SINGLE or (isinstance(obj, Repeatable) and obj.uses != 1):
        return None
    rendezvous = _reached()
    template = _templates.get(id(kind))
    if template is None or template[0] is not kind or template[1] is not rendezvous:
        template = _new_template(kind, rendezvous)
    token = os.urandom(_TOKEN)
    depot = rendezvous.depot()
    try:
        try:
            depot.put(token + _FIRST, fds, rendezvous.ttl, 1)
        finally:
            _check_open(obj, fds)  # as in `commit`
    except BaseException:
        with suppress(FdshareError, OSError):
            depot.take_back(token + _FIRST)
        raise
    return template[2] + token + template[3]


class _Reduces:
    """Pickles as it is told."""

    def __init__(self, reduced: Reduced) -> None:
        self._reduced = reduced

    def __reduce__(self) -> Reduced:
        return self._reduced


def _new_template(kind: Kind, rendezvous: Rendezvous) -> tuple[Kind, Rendezvous, bytes, bytes]:
    place = os.urandom(_TOKEN)
    label = _new_label(place, rendezvous)
    reduced = rendezvous.loader, (label, kind.tag, bytes(kind.spec), 0, 1)
    head, tail = pickle.dumps(_Reduces(reduced)).split(place)
    template = kind, rendezvous, head, tail
    if len(_templates) >= _REMEMBERED:
        _templates.clear()
    _templates[id(kind)] = template
    return template


# Receiving


def load(label: list[Any], tag: str, spec: bytes, first: int, count: int) -> Any:
    """The object of *tag* and *spec* with *count* descriptors from position *first* on, of the
    pickle whose parcel has *label*. Pickles name it: do not move or rename.
    """
    if type(label[-1]) is not _Arrival:
        token, address, private, ttl = label
        rendezvous = Rendezvous(address, private, ttl, load)
        if _current is None and private:
            suggest(rendezvous)
        depot = _depots.get(address) or rendezvous.depot()
        if not first:
            taken = depot.take(token + _FIRST)
            if len(taken) == count:
                return rebuild(Kind(tag, Raw(spec)), taken)
            label.append(_Arrival(depot, token, {0: list(taken)}))
        else:
            label.append(_Arrival(depot, token, {}))
    return rebuild(Kind(tag, Raw(spec)), label[-1].claim(first, count))


class _Arrival:
    """The descriptors of the pickle that is being loaded; closes those that nothing claims."""

    __slots__ = ("_depot", "_parts", "_token")

    def __init__(
        self, depot: Depot, token: bytes, parts: dict[int, list[Descriptor | None]]
    ) -> None:
        self._depot = depot
        self._token = token
        self._parts = parts

    def claim(self, first: int, count: int) -> list[Descriptor]:
        """The *count* descriptors from position *first* on; the caller owns them."""
        claimed: list[Descriptor] = []
        try:
            # In place: those before a failure are kept, to be closed.
            claimed.extend(map(self._claim, range(first, first + count)))
        except BaseException:
            close_all(claimed)
            raise
        return claimed

    def _claim(self, position: int) -> Descriptor:
        number, index = divmod(position, MAX_ENTRY_DESCRIPTORS)
        part = self._parts.get(number)
        if part is None:
            part = self._parts[number] = list(self._depot.take(_key(self._token, number)))
        descriptor = part[index] if index < len(part) else None
        if descriptor is None:
            raise AlreadyTaken(self._token.hex())
        part[index] = None
        return descriptor

    def __del__(self) -> None:
        for part in self._parts.values():
            close_all(descriptor for descriptor in part if descriptor is not None)
