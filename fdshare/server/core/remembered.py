"""Remembered: whose answers the table keeps for repeats, for how long, and how many bytes they are.

They are kept as long as their client is connected, and for a while where it may not have read them
and may come back. That is memory which a user makes both halves keep, so it counts against the
user, whether the client is here or absent. The table does not know whose the answers are: after the
death of a server they count against nobody until their clients are back.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import Final

from fdshare.errors import QuotaExceeded
from fdshare.server.core.ports import Session
from fdshare.server.core.table import Table
from fdshare.server.core.users import User, allowance
from fdshare.server.limits import Limits

__all__ = ["Remembered"]

_EACH: Final = 512  # bytes that an answer takes, about: it may have a name of 255
_CLIENT: Final = 1024  # ... and what is kept for a client beside its answers


class Remembered:
    """The clients for which *table* has answers."""

    def __init__(self, table: Table, limits: Limits) -> None:
        self._table = table
        self._limits = limits
        # Client -> until when its answers are kept, in this order.
        self.absent: OrderedDict[str, float] = OrderedDict()
        self._absent_of: dict[int, OrderedDict[str, None]] = {}  # the same of each uid
        self._here: dict[str, int] = {}  # client -> how many connections it has
        self._counted: dict[str, tuple[int, int]] = {}  # client -> its uid, and its bytes
        self._bytes: Counter[int] = Counter()  # uid -> of all of its clients
        self._total = 0

    def arrived(self, session: Session) -> None:
        """The client of *session* has connected, or reconnected."""
        name = session.name
        self._not_absent(name)
        if name:
            self._here[name] = self._here.get(name, 0) + 1
            if name in self._table.answers:
                self.recount(session)

    def has_left(self, name: str) -> bool:
        """Counts one connection less of a client. True if answers for it are remembered and it has
        no other connection: it may have reconnected before the end of the old one was seen."""
        count = self._here.pop(name, 0) - 1
        if count > 0:
            self._here[name] = count
        return count <= 0 and name in self._table.answers

    def keep(self, session: Session, until: float) -> None:
        """The client of *session* has left, and may come back."""
        self._not_absent(session.name)
        self.absent[session.name] = until
        if session.name in self._counted:
            uid = self._counted[session.name][0]
            self._absent_of.setdefault(uid, OrderedDict())[session.name] = None

    def expect(self, until: float) -> None:
        """After the death of a server: all of its clients may come back."""
        self.absent = OrderedDict.fromkeys(self._table.answers, until)

    def recount(self, session: Session) -> None:
        """An answer for the client of *session* is remembered."""
        name, uid = session.name, session.user.uid
        size = _CLIENT + len(self._table.answers[name]) * _EACH
        self._count_out(name)
        self._counted[name] = uid, size
        self._bytes[uid] += size
        self._total += size

    def forgotten(self, name: str) -> None:
        """The table has no answers for the client *name* any more."""
        self._not_absent(name)
        self._count_out(name)

    def refusal(self, user: User) -> QuotaExceeded | None:
        """The error if more is remembered for *user* than its share."""
        if user.trusted:
            return None
        limits, mine = self._limits, self._bytes[user.uid]
        others = self._total - mine
        share = allowance(limits.max_remembered_per_uid, limits.max_remembered, others)
        return None if mine <= share else QuotaExceeded("max_remembered_per_uid", share, mine)

    def longest_absent(self, uid: int) -> str | None:
        """The client of *uid* that is absent for longest."""
        return next(iter(self._absent_of.get(uid, ())), None)

    def due(self, now: float) -> str | None:
        """A client that had time enough to come back."""
        name = next(iter(self.absent), None)
        return name if name is not None and self.absent[name] <= now else None

    def _not_absent(self, name: str) -> None:
        self.absent.pop(name, None)
        uid, _ = self._counted.get(name, (-1, 0))
        absent = self._absent_of.get(uid)
        if absent is not None:
            absent.pop(name, None)
            if not absent:
                del self._absent_of[uid]

    def _count_out(self, name: str) -> None:
        uid, size = self._counted.pop(name, (0, 0))
        self._total -= size
        self._bytes[uid] -= size
        if not self._bytes[uid]:
            del self._bytes[uid]
