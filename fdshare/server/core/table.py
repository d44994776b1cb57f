"""Table: names -> entries. Pure: time comes in with the changes, what must be closed is returned.

The table decides nothing. `Service` plans a `Record`, the record is journaled, and `apply` carries
it out; the same records applied to another table make an equal table. A handle is what the caller
has for an open descriptor: the table stores it and gives it back.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final, Literal, TypeAlias

from fdshare.protocol.messages import Event, EventKind
from fdshare.server.core.records import (
    Drop,
    Forget,
    Grant,
    Linger,
    Move,
    Put,
    Record,
    Settle,
)

__all__ = [
    "ANSWERS_KEPT",
    "Applied",
    "Entry",
    "Handle",
    "Lease",
    "Table",
    "Usage",
    "usage_of",
]

Handle: TypeAlias = Any

# So many requests that change something can a client have unanswered and still repeat.
ANSWERS_KEPT: Final = 64


@dataclass(slots=True)
class Lease:
    """A take that is not confirmed yet. *handle* is our end of a socket pair: a byte on it
    confirms, the end of the stream returns the entry."""

    id: int
    handle: Handle
    at: float
    uid: int  # the taker's


@dataclass(slots=True)
class Entry:
    """What is held under one name.

    *put* made it; name, generation and time to live may have changed since. *reply* is the encoded
    answer to a fetch, made once by the service, and *prepared* the same as the event loop sends it.
    """

    put: Put
    name: str
    generation: int
    expires: float | None
    handles: tuple[Handle, ...]
    guard: Handle | None
    lease: Lease | None = None
    fetches: int = 0
    reply: bytes = b""
    prepared: object = None

    def all_handles(self) -> list[Handle]:
        """Those of the entry, its guard and its lease."""
        handles = list(self.handles)
        if self.guard is not None:
            handles.append(self.guard)
        if self.lease is not None:
            handles.append(self.lease.handle)
        return handles


@dataclass(slots=True)
class Applied:
    """What a record did: handles to be closed, our ends of leases, which are to be closed after
    them, events in order, and entries of which a guard, a lease or hang-ups are to be watched."""

    closed: list[Handle] = field(default_factory=list)
    ended: list[Handle] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    changed: list[Entry] = field(default_factory=list)

    @property
    def freed(self) -> list[Handle]:
        """All handles to which the table refers no more."""
        return [*self.closed, *self.ended]


@dataclass(slots=True)
class Usage:
    """What the entries of one uid amount to, and the leases on what it takes."""

    names: int = 0
    descriptors: int = 0


def usage_of(entry: Entry, uid: int) -> Usage:
    """The part of *entry* that counts against *uid*."""
    usage = Usage()
    if entry.put.registrant.uid == uid:
        usage.names = 1
        usage.descriptors = len(entry.handles) + (entry.guard is not None)
    if entry.lease is not None and entry.lease.uid == uid:
        usage.descriptors += 1
    return usage


class Table:
    """Names, generations, leases, deadlines and remembered answers."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self.leases: dict[int, Entry] = {}
        self.answers: dict[str, OrderedDict[int, bytes]] = {}
        self.generation = 0
        self.serial = 0
        self.last_lease = 0
        self.descriptors = 0
        self._usage: dict[int, Usage] = {}
        self.deadlines: list[tuple[float, int, str]] = []  # a heap, some of entries that are gone

    # Asking.

    def visible(self, name: str) -> Entry | None:
        """The entry that a fetch would see: a leased one is hidden."""
        entry = self.entries.get(name)
        return None if entry is None or entry.lease is not None else entry

    def usage(self, uid: int) -> Usage:
        """What counts against *uid*."""
        return self._usage.get(uid) or Usage()

    def handles(self) -> Iterator[Handle]:
        """Every handle the table refers to."""
        for entry in self.entries.values():
            yield from entry.all_handles()

    def next_deadline(self) -> float | None:
        """When the next entry expires; None if none does."""
        while self.deadlines:
            expires, generation, name = self.deadlines[0]
            entry = self.entries.get(name)
            if entry and entry.generation == generation and entry.expires == expires:
                return expires
            heapq.heappop(self.deadlines)
        return None

    def expired(self, now: float) -> list[Entry]:
        """The entries whose time has passed, earliest first; a leased one waits for its lease."""
        due: list[Entry] = []
        put_back = []
        while (deadline := self.next_deadline()) is not None and deadline <= now:
            item = heapq.heappop(self.deadlines)
            put_back.append(item)
            due.append(self.entries[item[2]])
        # When the record that drops them is applied, these are stale; if it fails, they are due
        # again.
        for item in put_back:
            heapq.heappush(self.deadlines, item)
        return due

    # Changes.

    def apply(self, record: Record, handles: list[Handle]) -> Applied:
        """Carries *record* out. *handles* are those that its changes draw, in order: the table owns
        them now, and the caller those in `closed` and `ended`."""
        applied = Applied()
        source = iter(handles)
        for change in record.changes:
            match change:
                case Put():
                    self._put(change, source, applied)
                case Drop():
                    self._remove(self.entries[change.name], applied)
                    self._event(applied, change.event, change.name, change.generation)
                case Move():
                    self._move(change, applied)
                case Grant():
                    self._grant(change, source, applied)
                case Settle():
                    self._settle(change, applied)
                case Linger():
                    self._linger(change, applied)
                case Forget():
                    self.answers.pop(change.session, None)
        if record.reply:
            answers = self.answers.setdefault(record.session, OrderedDict())
            answers[record.id] = record.reply
            if len(answers) > ANSWERS_KEPT:
                answers.popitem(last=False)
        return applied

    def _put(self, put: Put, source: Iterator[Handle], applied: Applied) -> None:
        former = self.entries.get(put.name)
        if former is not None:
            self._remove(former, applied)
        handles = tuple(islice(source, put.count))
        guard = next(source) if put.guarded else None
        entry = Entry(put, put.name, put.generation, put.expires, handles, guard)
        self._add(entry, applied)
        hidden = former is None or former.lease is not None
        event: Literal["registered", "replaced"] = "registered" if hidden else "replaced"
        self._event(applied, event, put.name, put.generation)

    def _move(self, move: Move, applied: Applied) -> None:
        entry = self.entries.pop(move.old)
        self._account(entry, -1)
        entry.name, entry.generation, entry.reply = move.new, move.generation, b""
        self._add(entry, applied)
        self._event(applied, "registered", move.new, move.generation, old=move.old)

    def _grant(self, grant: Grant, source: Iterator[Handle], applied: Applied) -> None:
        entry = self.entries[grant.name]
        entry.lease = Lease(grant.lease, next(source), grant.at, grant.uid)
        self.leases[grant.lease] = entry
        self.last_lease = max(self.last_lease, grant.lease)
        self._count(grant.uid, descriptors=1)
        applied.changed.append(entry)
        self._event(applied, "taken", entry.name, entry.generation)

    def _settle(self, settle: Settle, applied: Applied) -> None:
        entry = self.leases[settle.lease]
        if settle.outcome == "taken":
            self._remove(entry, applied)
            return
        applied.ended.append(self._end_lease(entry))
        self._event(applied, "returned", entry.name, entry.generation)

    def _linger(self, linger: Linger, applied: Applied) -> None:
        entry = self.entries[linger.name]
        if entry.guard is not None:
            applied.closed.append(entry.guard)
            entry.guard = None
            self._count(entry.put.registrant.uid, descriptors=-1)
        entry.expires = linger.expires
        self._schedule(entry)

    # What the changes have in common.

    def _add(self, entry: Entry, applied: Applied) -> None:
        self.entries[entry.name] = entry
        self.generation = max(self.generation, entry.generation)
        self._account(entry, +1)
        if entry.expires is not None:
            self._schedule(entry)
        applied.changed.append(entry)

    def _remove(self, entry: Entry, applied: Applied) -> None:
        applied.closed += entry.handles
        if entry.guard is not None:
            applied.closed.append(entry.guard)
        if entry.lease is not None:
            applied.ended.append(self._end_lease(entry))
        del self.entries[entry.name]
        self._account(entry, -1)

    def _end_lease(self, entry: Entry) -> Handle:
        assert entry.lease is not None
        lease, entry.lease = entry.lease, None
        del self.leases[lease.id]
        self._count(lease.uid, descriptors=-1)
        return lease.handle

    def _account(self, entry: Entry, sign: Literal[1, -1]) -> None:
        """Counts name and descriptors for the registrant's uid. The lease is the taker's."""
        count = len(entry.handles) + (entry.guard is not None)
        self._count(entry.put.registrant.uid, names=sign, descriptors=sign * count)

    def _count(self, uid: int, *, names: int = 0, descriptors: int) -> None:
        self.descriptors += descriptors
        usage = self._usage.setdefault(uid, Usage())
        usage.names += names
        usage.descriptors += descriptors
        if not usage.names and not usage.descriptors:
            del self._usage[uid]

    def _schedule(self, entry: Entry) -> None:
        assert entry.expires is not None
        heapq.heappush(self.deadlines, (entry.expires, entry.generation, entry.name))
        if len(self.deadlines) > 64 + 2 * len(self.entries):  # mostly stale: of replaced entries
            self.deadlines = [
                (entry.expires, entry.generation, entry.name)
                for entry in self.entries.values()
                if entry.expires is not None
            ]
            heapq.heapify(self.deadlines)

    def _event(
        self, applied: Applied, event: EventKind, name: str, generation: int, old: str = ""
    ) -> None:
        self.serial += 1
        applied.events.append(Event(self.serial, event, name, generation, old))
