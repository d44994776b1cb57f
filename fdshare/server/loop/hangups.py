"""Hangups: polls descriptors of the table: guards, leases, and those whose peer may hang up.

Only sockets of TCP and UNIX, pipes and pidfds are polled for a hang-up, and /proc tells what a
descriptor is: fstat(2) blocks for a file on a dead mount. The poller's keys hold the entry itself,
and the service looks it up again: a report that comes too late is ignored.
"""

from __future__ import annotations

import logging
import os
import select

from fdshare.kernel.borrowed_socket import has_connections
from fdshare.server.core.table import Entry
from fdshare.server.loop.closing import Handle
from fdshare.server.loop.loop import Loop
from fdshare.server.loop.poller import HANGUP, READ

__all__ = ["Hangups"]

log = logging.getLogger("fdshare.server")


class Hangups:
    """Registers handles with the poller of *loop*, and reports their events to its service."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        # The leases once more: which of many have moved is one question to the kernel.
        self._leases = select.poll()
        self._lease_of: dict[int, int] = {}  # descriptor -> lease

    def watch(self, entry: Entry) -> None:
        """Watches the guard and the lease of *entry*; its descriptors, too, if it is dropped on a
        hang-up."""
        if entry.guard is not None:
            self._watch(entry.guard, READ, _OwnerGone(self, entry))
        if entry.lease is not None:
            self._watch(entry.lease.handle, READ, _TakerMoved(self, entry.lease.id))
            self._leases.register(entry.lease.handle.fd, READ)
            self._lease_of[entry.lease.handle.fd] = entry.lease.id
        if entry.put.drop_on_hangup:
            for handle in entry.handles:
                if _can_hang_up(handle.fd):
                    # A pidfd's hang-up is that it becomes readable; data on a socket is none.
                    events = READ if _is_pidfd(handle.fd) else 0
                    self._watch(handle, HANGUP | events, _PeerGone(self, entry))

    def moved_leases(self) -> list[int]:
        """The leases whose takers have confirmed, or closed their ends."""
        return [self._lease_of[fd] for fd, _ in self._leases.poll(0)] if self._lease_of else []

    def forget(self, handle: Handle) -> None:
        """To be called before *handle* is closed: its registration would outlive it (poller.py)."""
        self.unwatch(handle)
        if self._lease_of.pop(handle.fd, None) is not None:
            self._leases.unregister(handle.fd)

    def unwatch(self, handle: Handle) -> None:
        """Reports nothing more of *handle*."""
        if handle.key is not None:
            self.loop.poller.unregister(handle.fd)
            handle.key = None

    def _watch(self, handle: Handle, events: int, key: object) -> None:
        self.unwatch(handle)
        try:
            self.loop.poller.register(handle.fd, events, key)
        except OSError as error:
            # The entry is in the table already: it is too late to refuse it.
            log.error("descriptor %d cannot be watched: %s", handle.fd, error)
            return
        handle.key = key


class _OwnerGone:
    """Called when a guard, a lifeline or a pidfd, is readable: the owner is gone."""

    __slots__ = ("entry", "hangups")

    def __init__(self, hangups: Hangups, entry: Entry) -> None:
        self.hangups, self.entry = hangups, entry

    def __call__(self, events: int, now: float) -> None:
        entry, loop = self.entry, self.hangups.loop
        if entry.guard is not None:
            self.hangups.unwatch(entry.guard)  # it stays readable
        loop.attempt(lambda now: loop.service.hung_up(entry, now, guard=True), now)


class _PeerGone:
    """Called when the peer of one of the entry's descriptors is gone."""

    __slots__ = ("entry", "hangups")

    def __init__(self, hangups: Hangups, entry: Entry) -> None:
        self.hangups, self.entry = hangups, entry

    def __call__(self, events: int, now: float) -> None:
        entry, loop = self.entry, self.hangups.loop
        for handle in entry.handles:
            self.hangups.unwatch(handle)
        loop.attempt(lambda now: loop.service.hung_up(entry, now, guard=False), now)


class _TakerMoved:
    """Called when the taker has confirmed, or closed its end."""

    __slots__ = ("hangups", "lease")

    def __init__(self, hangups: Hangups, lease: int) -> None:
        self.hangups, self.lease = hangups, lease

    def __call__(self, events: int, now: float) -> None:
        loop = self.hangups.loop
        entry = loop.service.table.leases.get(self.lease)
        if entry is not None and entry.lease is not None:
            self.hangups.unwatch(entry.lease.handle)
        loop.attempt(lambda now: loop.service.lease_moved(self.lease, now), now)


def _target(fd: int) -> str:
    """What /proc/self/fd/N points to. Never blocks, where fstat(2) on a dead mount does."""
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""


def _can_hang_up(fd: int) -> bool:
    return _target(fd).startswith("pipe:") or _is_pidfd(fd) or has_connections(fd)


def _is_pidfd(fd: int) -> bool:
    # "anon_inode:[pidfd]", and "pidfd:[1234]" since Linux 6.9 where pidfs shows it.
    target = _target(fd)
    return target.startswith("pidfd:") or target == "anon_inode:[pidfd]"
