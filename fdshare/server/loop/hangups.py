"""Vigil: what is noticed when a descriptor of the table stirs: an owner gone, a peer, a taker.

Hang-ups are looked for on sockets, pipes and pidfds alone, and what a descriptor is is read off
/proc: fstat(2) of a file on a dead mount blocks. The keys hold entries, not names or numbers, and
whatever they find is looked up again: a stir that comes late is ignored.
"""

from __future__ import annotations

import logging
import os

from fdshare.server.core.table import Entry
from fdshare.server.loop.closing import Handle
from fdshare.server.loop.loop import Loop
from fdshare.server.loop.poller import HANGUP, READ

__all__ = ["Vigil"]

log = logging.getLogger("fdshare.server")


class Vigil:
    """Watches handles of entries in the poller of *loop*, and tells its service."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop

    def watch(self, entry: Entry) -> None:
        """Watches guard, lease and, where it is to go with its peer, the descriptors of *entry*."""
        if entry.guard is not None:
            self._watch(entry.guard, READ, _OwnerGone(self, entry))
        if entry.lease is not None:
            self._watch(entry.lease.handle, READ, _TakerMoved(self, entry.lease.id))
        if entry.drop_on_hangup:
            for handle in entry.handles:
                if _can_hang_up(handle.fd):
                    # A pidfd's hang-up is that it becomes readable; data on a socket is none.
                    events = READ if _is_pidfd(handle.fd) else 0
                    self._watch(handle, HANGUP | events, _PeerGone(self, entry))

    def unwatch(self, handle: Handle) -> None:
        """Before it is closed: its registration would outlive it (see poller.py)."""
        if handle.key is not None:
            self.loop.poller.unregister(handle.fd)
            handle.key = None

    def _watch(self, handle: Handle, events: int, key: object) -> None:
        self.unwatch(handle)
        try:
            self.loop.poller.register(handle.fd, events, key)
        except OSError as error:
            # The entry is there and stays; a change that was made cannot be refused any more.
            log.error("descriptor %d cannot be watched: %s", handle.fd, error)
            return
        handle.key = key


class _OwnerGone:
    """A lifeline or pidfd has stirred: the owner is gone."""

    __slots__ = ("entry", "vigil")

    def __init__(self, vigil: Vigil, entry: Entry) -> None:
        self.vigil, self.entry = vigil, entry

    def __call__(self, events: int, now: float) -> None:
        entry, loop = self.entry, self.vigil.loop
        if entry.guard is not None:
            self.vigil.unwatch(entry.guard)  # it stays readable
        loop.attempt(lambda now: loop.service.hung_up(entry, now, guard=True), now)


class _PeerGone:
    """The peer of one of the entry's descriptors is gone."""

    __slots__ = ("entry", "vigil")

    def __init__(self, vigil: Vigil, entry: Entry) -> None:
        self.vigil, self.entry = vigil, entry

    def __call__(self, events: int, now: float) -> None:
        entry, loop = self.entry, self.vigil.loop
        for handle in entry.handles:
            self.vigil.unwatch(handle)
        loop.attempt(lambda now: loop.service.hung_up(entry, now, guard=False), now)


class _TakerMoved:
    """The taker has confirmed, or let go."""

    __slots__ = ("lease", "vigil")

    def __init__(self, vigil: Vigil, lease: int) -> None:
        self.vigil, self.lease = vigil, lease

    def __call__(self, events: int, now: float) -> None:
        loop = self.vigil.loop
        entry = loop.service.table.leases.get(self.lease)
        if entry is not None and entry.lease is not None:
            self.vigil.unwatch(entry.lease.handle)
        loop.attempt(lambda now: loop.service.lease_moved(self.lease, now), now)


def _target(fd: int) -> str:
    """What /proc calls it: never blocks, where fstat(2) on a dead mount does."""
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""


def _can_hang_up(fd: int) -> bool:
    return _target(fd).startswith(("socket:", "pipe:")) or _is_pidfd(fd)


def _is_pidfd(fd: int) -> bool:
    # "anon_inode:[pidfd]", and "pidfd:[1234]" since Linux 6.9 where pidfs shows it.
    target = _target(fd)
    return target.startswith("pidfd:") or target == "anon_inode:[pidfd]"
