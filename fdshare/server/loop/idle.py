"""Idle: which connection of a user can be closed to make room, found without a look at all.

Those whose last request is longest ago are the first. One that is found to wait for something, or
to be owed an answer, is put aside; it is back in the order when it is answered, or has read.
"""

from __future__ import annotations

from collections import OrderedDict

from fdshare.server.loop.connection import Connection

__all__ = ["Idle"]


class Idle(OrderedDict[Connection, None]):
    """The connections of one user, in the order of their last requests, but for those that are put
    aside; `move_to_end` is for one that is not, and has asked for something."""

    def __init__(self) -> None:
        super().__init__()
        self._engaged: OrderedDict[Connection, None] = OrderedDict()

    def restore(self, connection: Connection) -> None:
        """One that was put aside was answered, or has read: it is the last from now on."""
        connection.aside = False
        self._engaged.pop(connection, None)
        self[connection] = None

    def forget(self, connection: Connection) -> None:
        """It is closed."""
        self.pop(connection, None)
        self._engaged.pop(connection, None)

    def longest(self) -> Connection | None:
        """The one that is idle for longest, and would not even notice its end."""
        while self:
            connection = next(iter(self))
            if not _is_owed(connection) and not _is_engaged(connection):
                return connection
            del self[connection]
            connection.aside = True
            if not _is_owed(connection):
                self._engaged[connection] = None
        return None

    def longest_engaged(self) -> Connection | None:
        """Where `longest` found none: one that waits, or has entries that live as long as it does.
        It would lose nothing, but notice."""
        while self._engaged:
            connection = next(iter(self._engaged))
            if not _is_owed(connection):
                return connection
            del self._engaged[connection]
        return None


def _is_owed(connection: Connection) -> bool:
    """True where an answer is not made, not given or not read yet."""
    session = connection.session
    return bool(connection.output or connection.pending or connection.inspecting or session.owed)


def _is_engaged(connection: Connection) -> bool:
    session = connection.session
    return bool(session.waiting or session.watches or session.holds)
