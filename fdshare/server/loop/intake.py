"""Intake: receives from the clients, and counts the descriptors that are in no entry.

They are *unsettled*: of half a frame, of a request that waits, or in a close(2) that hangs. They
count against the user who sent them, who is heard no more if they are too many.

A message is never read that would bring more descriptors than there are numbers for. The kernel
drops those that find none (unix(7)), and would do so in this thread: the last copy of a socket with
SO_LINGER, among them, would stop the loop. So where few numbers are left, the loop peeks, and makes
copies of no more than half of them: one message does not use up what the next one needs. A user who
has some of the numbers already gets no more than a share, and none of the last ones. What is not
received costs little time.
"""

from __future__ import annotations

import errno
import socket
from typing import Final

from fdshare.errors import DescriptorLimit, FdshareError, QuotaExceeded
from fdshare.kernel.ancillary import MAX_DESCRIPTORS
from fdshare.server.core.table import Table
from fdshare.server.core.users import User, allowance
from fdshare.server.limits import RESERVE, Limits
from fdshare.server.loop.closing import Closer, Handle, receive_handles
from fdshare.server.loop.connection import Connection

__all__ = ["Intake", "NotNow"]

_FEW: Final = 16  # numbers, of which half are for one message
_PEEK: Final = int(socket.MSG_PEEK)


class NotNow(Exception):
    """Nothing was read: numbers of this user are about to become free."""


class Intake:
    """What the connections receive. *received*: how many descriptors came with half frames and with
    requests that wait."""

    def __init__(self, table: Table, limits: Limits, nofile: int, closer: Closer) -> None:
        """*nofile* is the limit of numbers that this process may have."""
        self.received = 0
        self.is_short = False  # few numbers were left at the last read
        self._holding: dict[Connection, None] = {}  # those with something unsettled
        self._table = table
        self._limits = limits
        self._numbers = nofile - RESERVE
        self._closer = closer

    def unsettled(self, user: User) -> int:
        """How many descriptors of *user* are unsettled."""
        return user.received + self._closer.hanging(user.uid)

    def refusal(self, user: User, connection: Connection | None = None) -> QuotaExceeded | None:
        """The error if *user* has too many descriptors that are unsettled, beside those that are
        received on *connection*: one message may be of any size."""
        unsettled = self.unsettled(user)
        if user.trusted or not unsettled:
            return None
        one_message = connection is not None and unsettled == connection.received
        if one_message or unsettled <= self._share(user):
            return None
        return self._too_many(user)

    def _too_many(self, user: User) -> QuotaExceeded:
        return QuotaExceeded("max_unsettled_per_uid", self._share(user), self.unsettled(user))

    def _share(self, user: User) -> int:
        others = self.received + self._closer.all_hanging() - self.unsettled(user)
        limits = self._limits
        return allowance(limits.max_unsettled_per_uid, limits.max_unsettled, others)

    def receive(
        self, connection: Connection, buffer: bytearray, connections: int
    ) -> tuple[int, list[Handle], FdshareError | None]:
        """(bytes, handles, why there are none although some came) of one read. *connections*: how
        many there are.

        Raises: BlockingIOError; NotNow; QuotaExceeded, DescriptorLimit: the client has sent more
        than its share of the numbers, or than there are, and nothing was read; OSError: the
        connection is gone.
        """
        sock, user = connection.sock, connection.session.user
        used = self._table.descriptors + connections + self.received
        closing = 0
        if not self._closer.is_done:
            used += self._closer.all_left()
            closing = self._closer.left(user.uid)
        half = (self._numbers - used) // 2
        self.is_short = half < _FEW
        most = max(half, 1)
        if not user.trusted and user.received + closing:
            most = max(min(half, self._share(user) - user.received - closing), 0)
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
            lost = self._no_numbers()
            if not user.trusted:
                if closing and not self._closer.hanging(user.uid):
                    raise NotNow
                raise lost if most >= half else self._too_many(user)
        if count:
            # Without room for descriptors: the kernel drops its copies. They are not the last, ours
            # are there; or it is a trusted user's loss.
            sock.recv_into(buffer, count)
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
        """Nothing of *connection* is unsettled any more."""
        self._add(connection, -connection.received)

    def over_share(self) -> Connection | None:
        """The connection that has most unsettled, of those whose users have more than their
        shares: one message may be of any size only where nobody needs the numbers."""
        over = [c for c in self._holding if self.refusal(c.session.user) is not None]
        return max(over, key=lambda connection: connection.received, default=None)

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
        limit = self._numbers + RESERVE
        return DescriptorLimit(errno.EMFILE, "RLIMIT_NOFILE", limit, None, "server", advice)
