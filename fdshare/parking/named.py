"""Parking at a rendezvous server that somebody named: `install(path)`.

What is parked there is an entry like any other, with a name that nobody can guess: it survives what
the server survives, is under its policy and its limits, and can be looked at.
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
    """The Depot in a rendezvous server: entries whose names nobody can guess.

    One use is one entry: a taker that dies before it has confirmed gives its own use back.
    """

    def __init__(self, address: str) -> None:
        self._client = Client(address)

    def check(self) -> None:
        self._client.ping()

    def put(self, key: bytes, fds: Sequence[int], ttl: float, uses: int) -> None:
        name = _name(key)
        cargo = _Cargo(fds)
        for use in range(uses):
            self._client.register(name if uses == 1 else f"{name}/{use}", cargo, ttl=ttl)

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
                continue  # somebody was faster
        raise AlreadyTaken(name) from None

    def take_back(self, key: bytes) -> None:
        name = _name(key)
        for found in [name, *self._client.names(f"{name}/*")]:
            with suppress(NameNotFound):
                self._client.unregister(found)

    def close(self) -> None:
        self._client.close()


class _Cargo:
    """Descriptors on their way to the server: its kind says nothing of what they are."""

    __slots__ = ("fds",)

    def __init__(self, fds: Sequence[int]) -> None:
        self.fds = list(fds)


_CARGO: Final = Kind("parcel", Raw(msgpack.encode(None)))
describers[_Cargo] = lambda cargo: (_CARGO, cargo.fds)


def _name(key: bytes) -> str:
    return f"parcel/{key.hex()}"
