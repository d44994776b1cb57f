"""Parking in a rendezvous server: the one that `install(path)` named.

What is parked there is an entry like any other, with a name that nobody can guess: it survives what
the server survives, is subject to its policy and its limits, and is listed by `fdshare ls`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

from msgspec import Raw, msgpack

from fdshare.client.blocking.client import Client
from fdshare.errors import AlreadyTaken, NameNotFound
from fdshare.kernel.descriptor import Descriptor
from fdshare.kinds import Kind, describers

__all__ = ["NamedServer"]


class NamedServer:
    """The ParkingServer that a rendezvous server is: entries whose names nobody can guess.

    One use is one entry: a taker that dies before it has confirmed gives its own use back.
    """

    def __init__(self, address: str) -> None:
        self._client = Client(address)

    def check(self) -> None:
        self._client.ping()

    def put(self, key: bytes, fds: Sequence[int], ttl: float, uses: int) -> None:
        name = _name(key)
        descriptors = _Descriptors(fds)
        for use in range(uses):
            self._client.register(name if uses == 1 else f"{name}/{use}", descriptors, ttl=ttl)

    def take(self, key: bytes) -> list[Descriptor]:
        name = _name(key)
        try:
            return self._client.take_raw(name)
        except NameNotFound:
            pass
        while left := self._client.names(f"{name}/*"):
            try:
                return self._client.take_raw(random.choice(left))
            except NameNotFound:
                continue  # another process took it
        raise AlreadyTaken(name) from None

    def take_back(self, key: bytes) -> None:
        name = _name(key)
        for found in [name, *self._client.names(f"{name}/*")]:
            with suppress(NameNotFound):
                self._client.unregister(found)

    def close(self) -> None:
        self._client.close()


class _Descriptors:
    """Descriptors on their way to the server; their kind is in the pickle, and not known here."""

    __slots__ = ("fds",)

    def __init__(self, fds: Sequence[int]) -> None:
        self.fds = list(fds)


_PARCEL: Final = Kind("parcel", Raw(msgpack.encode(None)))
describers[_Descriptors] = lambda descriptors: (_PARCEL, descriptors.fds)


def _name(key: bytes) -> str:
    return f"parcel/{key.hex()}"
