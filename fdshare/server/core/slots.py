"""Slots: where in the page each followed name is, and what is written there. Pure.

Theory of operation. A follower has an object, and the stamp that stood in the slot of its name when
it was answered. As long as the slot has that stamp, the object is the one that a fetch would give.
So a slot gets a new stamp before anybody is told of a change of its name: registered, replaced,
leased, returned, removed, renamed, or that another policy decides about it. No stamp is written
twice. A follower that sees another one asks again, and is told where to look from now on.

So the server need not know who follows, nor count: a slot is free again as soon as its name has
changed, and a name gets one when it is asked for. Where all slots are taken, the names beyond share
one, whose stamp is new after each change of any name: their followers ask in vain sometimes, and
miss nothing. A server that takes over writes new stamps into all slots before it serves anybody.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple, Protocol

from fdshare.protocol.messages import Event

__all__ = ["FIRST", "NOWHERE", "SHARED", "Mark", "Page", "Slots"]

SHARED: Final = 2  # the slot of the names that have none of their own; before it is the header
FIRST: Final = 3  # of the other slots


class Page(Protocol):
    """The memory that followers can read: *size* slots, in which nothing but stamps is written."""

    id: int
    size: int
    handle: Any  # of the descriptor that a client gets

    def write(self, slot: int, stamp: int) -> None:
        """*stamp* is in *slot* for every reader when this returns. Raises: OSError."""

    def write_all(self) -> int:
        """Writes into every slot that was ever used one stamp, which is greater than all that were
        written before, and returns it."""


class Mark(NamedTuple):
    """*stamp* is in *slot* until the name changes; slot 0: there is none, ask each time."""

    slot: int
    stamp: int


NOWHERE: Final = Mark(0, 0)


class Slots:
    """Which name has which slot of *page*; None where there is no page."""

    def __init__(self, page: Page | None) -> None:
        self.page = page
        self._places: dict[str, Mark] = {}
        self._free: list[int] = []
        self._next = FIRST
        self._stamp = 0 if page is None else page.write_all()
        self._shared = NOWHERE

    def place(self, name: str) -> Mark:
        """Where the followers of *name* look from now on."""
        known = self._places.get(name)
        if known is not None:
            return known
        if self.page is None:
            return NOWHERE
        slot = self._take()
        if slot == SHARED and self._shared.slot:
            return self._shared
        try:
            # Here the kernel may have no memory for it; later it has.
            place = self._write(slot)
        except OSError:
            if slot != SHARED:
                self._free.append(slot)
            return NOWHERE
        if slot == SHARED:
            self._shared = place
        else:
            self._places[name] = place
        return place

    def changed(self, events: Sequence[Event]) -> None:
        """Called with what a record has changed, before anybody is told of it."""
        for event in events:
            self._free_slot(event.name)
            if event.old:
                self._free_slot(event.old)
        if events and self._shared.slot:
            self._shared = self._write(SHARED)

    def changed_all(self) -> None:
        """Any name may have changed for somebody: all followers ask again."""
        for name in list(self._places):
            self._free_slot(name)
        if self._shared.slot:
            self._shared = self._write(SHARED)

    def _free_slot(self, name: str) -> None:
        place = self._places.pop(name, None)
        if place is not None:
            self._write(place.slot)
            self._free.append(place.slot)

    def _take(self) -> int:
        if self._free:
            return self._free.pop()
        assert self.page is not None
        if self._next >= self.page.size:
            return SHARED
        self._next += 1
        return self._next - 1

    def _write(self, slot: int) -> Mark:
        assert self.page is not None
        self._stamp += 1
        self.page.write(slot, self._stamp)
        return Mark(slot, self._stamp)
