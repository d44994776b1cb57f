"""RunQueue: the connections that are ready, or have requests left, and are still to be served.

Where more is ready than one turn of the loop has time for, it is kept here, and the poller is not
asked for it again: so what the poller reports next is new, however much waits. epoll(7) would
report first what was ready first. There who has hundreds of connections would be served hundreds
of times before the one connection of somebody else. So users share the time.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from itertools import count
from typing import Final

from fdshare.server.core.users import User
from fdshare.server.loop.connection import Connection

__all__ = ["RunQueue"]

# Seconds for which who comes again has to wait at most because the loop worked for it before: it
# may have worked for others meanwhile, by a garbage collection.
_DEBT: Final = 0.0005


class RunQueue:
    """The next one is of the user for whom the loop has worked least; each user's are in the order
    in which they came. Nobody saves time: who comes counts as one for whom it has worked as much as
    for the least of those who are here. So who asks for little is served at once, however much the
    others ask for; and these wait for each other."""

    def __init__(self) -> None:
        self._of: dict[User, OrderedDict[Connection, None]] = {}
        self._users: list[tuple[float, int, User]] = []  # a heap, of those that wait
        self._order = count()
        self._least = 0.0  # the time of the user that was served last
        self._length = 0

    def __bool__(self) -> bool:
        return self._length > 0

    def put(self, connection: Connection) -> None:
        """Does nothing if it is there already."""
        user = connection.session.user
        mine = self._of.get(user)
        if mine is None:
            mine = self._of[user] = OrderedDict()
            user.time = min(max(user.time, self._least), self._least + _DEBT)
            self._push(user)
        self._length += connection not in mine
        mine[connection] = None

    def forget(self, connection: Connection) -> None:
        """It is closed. Does nothing if it is not there."""
        mine = self._of.get(connection.session.user)
        if mine is not None and connection in mine:
            del mine[connection]
            self._length -= 1

    def next(self) -> Connection | None:
        """Removes and returns the one that is served next, and then given to `served`; None if
        there is none."""
        while self._users:
            self._least, _, user = heapq.heappop(self._users)
            if mine := self._of[user]:
                connection, _ = mine.popitem(last=False)
                self._length -= 1
                return connection
            del self._of[user]
        return None

    def served(self, connection: Connection, seconds: float) -> None:
        """The loop has worked so long for *connection*."""
        user = connection.session.user
        user.time += seconds
        if self._of[user]:
            self._push(user)
        else:
            del self._of[user]

    def _push(self, user: User) -> None:
        heapq.heappush(self._users, (user.time, next(self._order), user))
