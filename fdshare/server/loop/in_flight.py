"""InFlight: the descriptors that were sent and not yet read: in all, of each user and connection.

The kernel counts them against the user that the server runs as (unix(7), ETOOMANYREFS), so clients
share a budget, and no uid may use it up. SIOCOUTQ tells what a client has read. It is asked when
the budget is short, and of a few connections at a time: a turn of the loop does not get longer with
their number. A client that has not read for `request_timeout` is deaf.
"""

from __future__ import annotations

import time
from collections import defaultdict
from itertools import islice
from typing import Final

from fdshare.server.core.users import User, allowance
from fdshare.server.limits import Limits
from fdshare.server.loop.connection import Connection

__all__ = ["InFlight"]

_SOME: Final = 32  # connections that are asked at a time
_PAUSE: Final = 0.002  # seconds between times, as long as requests ask for it
_EVERY: Final = 1.0  # seconds after which a connection is asked again whether it has read anything


class InFlight:
    """Counts, and says what may still be sent. *total* is never too small: who has read since he
    was asked last is still counted. *silent*: those that `deaf` is about to tell."""

    def __init__(self, limits: Limits) -> None:
        self.total = 0
        self._limits = limits
        # Who has something unread: next to be asked first.
        self._all: dict[Connection, None] = {}
        self._of: defaultdict[User, dict[Connection, None]] = defaultdict(dict)
        self.silent: list[Connection] = []
        self._look_again = 0.0

    def fits(self, connection: Connection, count: int) -> bool:
        """True if *count* more keep within the budgets, of all, of the uid and of the connection.

        A uid that has nothing in flight may have one message of any size. A connection that has not
        read may take a part of what is left of the budget of all, and never its last quarter:
        clients that do not read leave room for those that do.
        """
        if not self.has_room(connection.session.user, count):
            return False
        if not connection.in_flight:
            return True
        left = self._limits.in_flight * 3 // 4 - self.total
        most = min(self._limits.in_flight_per_connection, 2 * left)
        return connection.in_flight + count <= most

    def has_room(self, user: User, count: int = 1) -> bool:
        """True if *count* more keep within the budgets of all and of *user*."""
        limits, total = self._limits, self.total
        if total + count > limits.in_flight:
            return not total  # an entry may be larger than the budget
        if user.trusted or not user.in_flight:
            return True
        others = total - user.in_flight
        most = allowance(limits.in_flight_per_uid, limits.in_flight, others)
        return user.in_flight + count <= most

    def makes_room(self, connection: Connection, count: int, now: float) -> bool:
        """As `fits`, after the kernel was asked what has been read."""
        if self.fits(connection, count):
            return True
        self.has_read(connection)
        if now >= self._look_again and not self.fits(connection, count):
            self._look_again = now + _PAUSE
            self.look(now, connection.session.user)
            self.look(now)
        return self.fits(connection, count)

    def sent(self, connection: Connection, count: int) -> None:
        """*count* descriptors have left on *connection*."""
        if not connection.in_flight:
            connection.unread_since = time.monotonic()
            connection.look_at = connection.unread_since + self._every()
            connection.unread_size = 0
            self._all[connection] = self._of[connection.session.user][connection] = None
        connection.in_flight += count
        connection.session.user.in_flight += count
        self.total += count

    def forget(self, connection: Connection) -> None:
        """Nothing is in flight on *connection*: it has read all, or is closed."""
        if not connection.in_flight:
            return
        user = connection.session.user
        self.total -= connection.in_flight
        user.in_flight -= connection.in_flight
        connection.in_flight = 0
        del self._all[connection]
        del self._of[user][connection]
        if not self._of[user]:
            del self._of[user]

    def has_read(self, connection: Connection) -> bool:
        """True if *connection* has read everything, as the kernel says now."""
        if connection.in_flight and not connection.unread():
            self.forget(connection)
        return not connection.in_flight

    def look(self, now: float, user: User | None = None) -> None:
        """Asks the kernel about some connections of *user*, or of any, those first that were not
        asked for longest."""
        flying = self._all if user is None else self._of.get(user, {})
        for connection in list(islice(flying, _SOME)):
            self._look_at(connection, now)

    # Clients that do not read.

    def next_look(self) -> float:
        """When `deaf` has something to do, where anything is in flight, or anybody `silent`."""
        return 0.0 if self.silent else next(iter(self._all)).look_at

    def measure(self) -> int:
        """`total`, as the kernel says now where few have something unread; else as it said soon
        before."""
        for connection in list(islice(self._all, _SOME)):
            self.has_read(connection)
        return self.total

    def deaf(self, now: float) -> list[Connection]:
        """Those that have read nothing for `request_timeout`, although something is unread."""
        for connection in list(islice(self._all, _SOME)):
            if connection.look_at > now:
                break
            self._look_at(connection, now)
        found, self.silent = self.silent, []
        return found

    def _look_at(self, connection: Connection, now: float) -> None:
        before = connection.unread_size
        if self.has_read(connection):
            return
        if connection.unread_size < before:  # it reads, however slowly
            connection.unread_since = now
        elif now - connection.unread_since >= self._limits.request_timeout:
            self.silent.append(connection)
        connection.look_at = now + self._every()
        for flying in (self._all, self._of[connection.session.user]):
            del flying[connection]
            flying[connection] = None  # behind the others

    def _every(self) -> float:
        return min(_EVERY, self._limits.request_timeout / 8)
