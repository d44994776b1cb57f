"""RunQueue: the connections that are ready, or have requests left, and are still to be served.

Where more is ready than one turn of the loop has time for, it is kept here, and the poller is not
asked for it again: so what the poller reports next is new, however much waits. epoll(7) would
report first what was ready first. There who has hundreds of connections would be served hundreds
of times before the one connection of somebody else. So users are served in turn.
"""

from __future__ import annotations

from collections import OrderedDict

from fdshare.server.core.users import User
from fdshare.server.loop.connection import Connection

__all__ = ["RunQueue"]


class RunQueue:
    """One connection of each user, then another one of each, and so on: each user's in the order in
    which they came. So nobody waits for more than one connection of each other user. A user who
    comes is the first one if it was served before those that are here, else the last one."""

    def __init__(self) -> None:
        # Served longest ago are the first.
        self._of: OrderedDict[User, OrderedDict[Connection, None]] = OrderedDict()
        self._served = 0  # how many

    def __bool__(self) -> bool:
        return bool(self._of)

    def put(self, connection: Connection) -> None:
        """Does nothing if it is there already."""
        user = connection.session.user
        mine = self._of.get(user)
        if mine is None:
            first = next(iter(self._of), None)
            mine = self._of[user] = OrderedDict()
            # Who comes for the first time may have gone for that, and come again.
            if first is not None and 0 < user.served < first.served:
                self._of.move_to_end(user, last=False)
        mine[connection] = None

    def forget(self, connection: Connection) -> None:
        """It is closed. Does nothing if it is not there."""
        mine = self._of.get(connection.session.user)
        if mine is not None and connection in mine:
            del mine[connection]
            if not mine:
                del self._of[connection.session.user]

    def next(self) -> Connection | None:
        """Removes and returns the one that is served next; None if there is none."""
        if not self._of:
            return None
        user, mine = next(iter(self._of.items()))
        connection, _ = mine.popitem(last=False)
        self._served += 1
        user.served = self._served
        if mine:
            self._of.move_to_end(user)
        else:
            del self._of[user]
        return connection
