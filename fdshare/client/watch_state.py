"""WatchState: what a watch knows, without the waiting. Replies in, snapshots and events out.

Theory of operation. A watch is answered by a Snapshot that is true at one serial; every change of
the server takes the next serial and is told once to each connection, under id 0. So a watch counts
for itself only the events that match its pattern and come after its snapshot::

    lost() ──> waiting for a snapshot ──(last part)──> live ──(Overflowed)──> waiting ...

While it waits it ignores events, because the snapshot has their effect. Items that nobody draws are
kept up to a bound; beyond it they are all folded into one snapshot, as if the watch began now, or
as after a reconnect if one of them was. So history may be shortened, but the state always
converges.
"""

from __future__ import annotations

from collections import deque
from typing import ClassVar, Final, Literal, TypeAlias

import msgspec

from fdshare.protocol import messages as m
from fdshare.protocol.names import matcher

__all__ = ["Snapshot", "WatchItem", "WatchState"]

# More than one read of the blocking client brings (64 KiB): only the asynchronous one folds.
_KEPT: Final = 4096
_THERE: Final = frozenset(("registered", "replaced", "returned"))


Reason: TypeAlias = Literal["start", "overflow", "reconnect"]


class Snapshot(msgspec.Struct, frozen=True):
    """All that is registered at *serial*: name -> generation.

    *reason* is "start"; "overflow" if this watcher was too slow and events were dropped; or
    "reconnect" if the server was lost and perhaps is another one now, with serials of its own.
    """

    entries: dict[str, int]
    serial: int
    reason: Reason
    event: ClassVar[Literal["snapshot"]] = "snapshot"


WatchItem: TypeAlias = Snapshot | m.Event


class WatchState:
    """The state of one watch. `held`: name -> generation as of the last item that was drawn."""

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.held: dict[str, int] = {}
        self.live = False
        self._matches = matcher(pattern)
        self._reason: Reason = "start"
        self._serial = 0
        self._parts: dict[str, int] = {}
        self._queue: deque[WatchItem] = deque()

    # In.

    def lost(self) -> None:
        """The connection ended: on the next one a snapshot comes first."""
        if self.live or self._reason == "overflow":
            self._reason = "reconnect"
        self.live = False
        self._parts = {}

    def overflowed(self) -> None:
        """The server dropped events; it sends a new snapshot by itself."""
        if self.live:
            self._reason = "overflow"
        self.live = False
        self._parts = {}

    def snapshot(self, part: m.SnapshotPart) -> None:
        """A part of the snapshot that answers the Watch, or of a new one."""
        self._parts.update(part.entries)
        if part.more:
            return
        entries, self._parts = self._parts, {}
        self._serial, self.live = part.serial, True
        self._keep(Snapshot(entries, part.serial, self._reason))

    def event(self, event: m.Event) -> bool:
        """An event of the connection, of this watch or another. True if there is more to draw."""
        if not self.live or event.serial <= self._serial:
            return False
        if not self._matches(event.name):
            if not (event.old and self._matches(event.old)):
                return False
            # Renamed to what this watch does not match: for it, the entry is gone.
            event = m.Event(event.serial, "unregistered", event.old, event.generation)
        self._serial = event.serial
        self._keep(event)
        return True

    # Out.

    def draw(self) -> WatchItem | None:
        """The next snapshot or event, in the order of serials; None if there is none yet."""
        if not self._queue:
            return None
        change = self._queue.popleft()
        self.held = _applied(self.held, change)
        return change

    def _keep(self, change: WatchItem) -> None:
        self._queue.append(change)
        if len(self._queue) > _KEPT:
            table = dict(self.held)
            reason: Reason = "overflow"
            for kept in self._queue:
                table = _applied(table, kept)
                if type(kept) is Snapshot and kept.reason == "reconnect":
                    reason = "reconnect"
            self._queue.clear()
            self._queue.append(Snapshot(table, change.serial, reason))


def _applied(table: dict[str, int], change: WatchItem) -> dict[str, int]:
    """*table* after *change*: itself, or another one."""
    if type(change) is Snapshot:
        return dict(change.entries)
    assert isinstance(change, m.Event)
    if change.old:
        table.pop(change.old, None)
    if change.event in _THERE:
        table[change.name] = change.generation
    else:
        table.pop(change.name, None)
    return table
