"""Intake: receives from the clients, and counts the descriptors that are open because of a user.

They are those of its entries and leases, its connections, what came with half a frame or with a
request that waits, and what is let go of and not closed yet. A user may have half of the numbers
that others leave: so there are some for the next one, however many take all they can.

A message is never read that would bring more descriptors than its user may have. The kernel drops
those that find no number (unix(7)), and would do so in this thread: the last copy of a socket with
SO_LINGER, among them, would stop the loop. So where there may be too many, the loop peeks, and
makes copies of as many as the user may have. What is not received costs little time.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Collection
from typing import Final

from fdshare.errors import DescriptorLimit, DescriptorRefused, FdshareError, QuotaExceeded
from fdshare.kernel.ancillary import MAX_DESCRIPTORS, receive_numbers
from fdshare.server.core.table import Table
from fdshare.server.core.users import User, allowance
from fdshare.server.limits import Limits, usable
from fdshare.server.loop.closing import Closer, Handle, receive_handles
from fdshare.server.loop.connection import Connection
from fdshare.server.loop.keeper_closes import KeeperCloses

__all__ = ["Intake", "NotNow"]

_PEEK: Final = int(socket.MSG_PEEK)
_FEW: Final = 32  # numbers: where no more are left, half requests give way
_PART: Final = (
    16  # of those that are left, whoever has its share already may receive one in so many
)


class NotNow(Exception):
    """Nothing was read: numbers of this user are about to become free."""


class Intake:
    """What the connections receive. *received*: how many descriptors came with half frames and with
    requests that wait."""

    def __init__(
        self,
        table: Table,
        limits: Limits,
        nofile: int,
        closer: Closer,
        keeper_closes: KeeperCloses,
        connections: Collection[Connection],
    ) -> None:
        """*nofile* is the limit of numbers that this process may have; *connections* are all."""
        self.received = 0
        self.is_short = False  # few numbers were left at the last read
        self._holding: dict[Connection, None] = {}  # those that have received something
        self._table = table
        self._limits = limits
        self._nofile = nofile
        self._numbers = usable(nofile)
        self._closer = closer
        self._keeper_closes = keeper_closes
        self._connections = connections

    def open_of(self, user: User) -> int:
        """How many descriptors are open because of *user*."""
        entries = self._table.usage(user.uid).descriptors
        return entries + user.connections + user.received + self._to_close(user.uid)

    def _to_close(self, uid: int) -> int:
        """How many of *uid* are removed and still open, in the half that has more of them."""
        return max(self._closer.left(uid), self._keeper_closes.of(uid))

    def _is_hanging(self, user: User) -> bool:
        return self._closer.hanging(user.uid) > 0 or self._keeper_closes.hangs(user.uid)

    def refusal(self, user: User) -> QuotaExceeded | None:
        """The error if *user* may have no descriptor more."""
        if user.trusted:
            return None
        mine = self.open_of(user)
        share = self._share(self._used() - mine)
        return None if mine < share else QuotaExceeded("max_open_per_uid", share, mine)

    def _used(self) -> int:
        used = self._table.descriptors + len(self._connections) + self.received
        if self._closer.is_done and not self._keeper_closes.open:
            return used
        return used + sum(map(self._to_close, {*self._closer.owners(), *self._keeper_closes.open}))

    def _share(self, others: int) -> int:
        most = min(self._limits.max_open_per_uid, self._numbers)
        return allowance(most, self._numbers, others)

    def receive(
        self, connection: Connection, buffer: bytearray
    ) -> tuple[int, list[Handle], FdshareError | None]:
        """(bytes, handles, why there are none although some came) of one read.

        Raises: BlockingIOError; NotNow; QuotaExceeded, DescriptorLimit: the client has sent more
        than its share of the numbers, or than there are, and nothing was read; OSError: the
        connection is gone.
        """
        sock, user = connection.sock, connection.session.user
        used = self._used()
        free = self._numbers - used
        self.is_short = free < _FEW
        if user.trusted:
            most = max(free // 2, 1)
        else:
            mine = self.open_of(user)
            share = self._share(used - mine)
            most = max(share - mine, 0)
            closing = self._to_close(user.uid)
            if not most and not user.received and not closing:
                most = max(free // _PART, 0)  # to replace some of what it has
        if most >= MAX_DESCRIPTORS:
            return receive_handles(sock, buffer, user.uid)
        count, handles, lost = receive_handles(sock, buffer, user.uid, _PEEK, most)
        if lost is None and count == len(buffer) and handles:
            # A peek that fills its buffer looks on: they may be of a message behind it. There is
            # room for a second copy.
            self._closer.close(handles)
            return receive_handles(sock, buffer, user.uid)
        if lost is not None:
            self._closer.close(handles)
            handles = []
            if not isinstance(lost, DescriptorRefused):
                lost = self._no_numbers()
                if not user.trusted:
                    if closing and not self._is_hanging(user):
                        raise NotNow
                    raise lost if self.is_short else QuotaExceeded("max_open_per_uid", share, mine)
        if count:
            # Without room for descriptors: the kernel drops its copies. They are not the last, ours
            # are there; or it is a trusted user's loss. Those that a peek did not bring may be of a
            # message behind its bytes: then nothing is dropped.
            view = memoryview(buffer)[:count]
            _, _, dropped = receive_numbers(sock, view, most=0)
            lost = lost if dropped is not None else None
        return count, handles, lost

    def recount(self, connection: Connection) -> None:
        """Counts what *connection* has received and not settled."""
        count = len(connection.receiver.waiting())
        count += sum(len(frame.descriptors) for frame in connection.pending)
        self._add(connection, count - connection.received)

    def take(self, connection: Connection, count: int) -> None:
        """*count* of those received are being settled."""
        self._add(connection, -min(count, connection.received))

    def forget(self, connection: Connection) -> None:
        """Nothing that came on *connection* waits any more."""
        self._add(connection, -connection.received)

    def gives_way(self, least: int | None = None) -> Connection | None:
        """The connection that has received most of those whose users have received more than
        *least*, or than all that is left."""
        if least is None:
            least = self._numbers - self._used()
        users = {c.session.user for c in self._holding}
        over = {user for user in users if user.received > least and not user.trusted}
        theirs = (c for c in self._holding if c.session.user in over)
        return max(theirs, key=lambda connection: connection.received, default=None)

    def _add(self, connection: Connection, count: int) -> None:
        connection.received += count
        if connection.received:
            self._holding[connection] = None
        else:
            self._holding.pop(connection, None)
        connection.session.user.received += count
        self.received += count

    def _no_numbers(self) -> DescriptorLimit:
        advice = "unregister some or raise it"
        return DescriptorLimit(errno.EMFILE, "RLIMIT_NOFILE", self._nofile, None, "server", advice)
