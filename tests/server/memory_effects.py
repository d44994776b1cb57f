"""An Effects of the service without a kernel: handles are numbers, and it keeps all promises.

What a client of it sees is in its `Inbox`; the keeper is a second table, fed with what the
journal carries, through bytes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from fdshare.errors import DescriptorLimit, KeeperUnavailable
from fdshare.protocol import messages as m
from fdshare.server.core.policy import Decision, Policy, Subject
from fdshare.server.core.ports import JournalBusy, LeaseState, Session
from fdshare.server.core.records import Grant, Put, Record, decode_record, encode_record
from fdshare.server.core.service import Service
from fdshare.server.core.table import Entry, Table
from fdshare.server.core.users import User
from fdshare.server.limits import Limits


@dataclass
class Inbox:
    """What one connection was sent: (id, reply, handles)."""

    sent: list[tuple[int, Any, tuple[int, ...]]] = field(default_factory=list)
    closed: bool = False

    def take(self) -> list[tuple[int, Any, tuple[int, ...]]]:
        sent, self.sent = self.sent, []
        return sent


class ArrayPage:
    """A page without a kernel. Its handle is a number that nothing else has."""

    id, handle = 77, -1

    def __init__(self, size: int = 6) -> None:
        self.size = size
        self.words = [0] * size
        self.full = False

    def write(self, slot: int, stamp: int) -> None:
        if self.full:
            raise OSError
        assert stamp > max(self.words)  # so no slot ever has one twice
        self.words[slot] = stamp

    def write_all(self) -> int:
        stamp = max(self.words) + 1
        self.words = [stamp if word else 0 for word in self.words]
        return stamp


class MemoryEffects:
    """Opens, closes and leases; `busy` and `broken` are the keeper's moods, `full` the server's."""

    auditing = strict = False
    epoch = "epoch"

    def __init__(
        self,
        *,
        own_uid: int = 1,
        limits: Limits | None = None,
        page: ArrayPage | None = None,
    ) -> None:
        self.page = page
        self.table = Table()
        self.keeper = Table()
        self.service = Service(self.table, Policy(own_uid), limits or Limits.for_rlimit(1000), self)
        self.open: set[int] = set()
        self.reached: set[int] = set()  # those that clients can connect to
        self.leases: dict[int, LeaseState] = {}  # our end -> what the taker did
        self.lease_of: dict[int, int] = {}  # the taker's end -> ours
        self.revoked: set[int] = set()
        self.watched: list[Entry] = []
        self.busy = self.broken = self.full = self.audit_full = False
        self._last = 0

    def audit_is_full(self) -> bool:
        return self.audit_full

    # For the test.

    def new_handles(self, count: int) -> list[int]:
        made = []
        for _ in range(count):
            self._last += 1
            self.open.add(self._last)
            made.append(self._last)
        return made

    def session(self, uid: int = 1, name: str = "") -> Session:
        user = User(uid, uid in (0, self.service.policy.own_uid))
        session = Session(Subject(uid, uid), 1000 + uid, user)
        session.name = name
        session.route = Inbox()
        self.service.greeted(session)
        return session

    def say(self, taker: int, word: Literal["confirmed", "dropped"]) -> bool:
        """The taker confirms or closes its end. False where the lease was revoked before."""
        ours = self.lease_of[taker]
        if ours in self.revoked or ours not in self.leases:
            return False
        if self.leases[ours] == "held":
            self.leases[ours] = word
        return True

    # The Effects of the service.

    def answer(self, session: Session, id: int, body: bytes, handles: Sequence[int] = ()) -> None:
        assert set(handles) <= self.open | {ArrayPage.handle}
        if session.route.closed:
            for handle in set(handles) & set(self.lease_of):
                self.say(handle, "dropped")  # nobody has the taker's end
            return
        session.route.sent.append((id, m.decode_reply(body), tuple(handles)))

    def answer_in_parts(self, session: Session, id: int, bodies: Sequence[bytes]) -> None:
        for body in bodies:
            self.answer(session, id, body)

    def publish(self, sessions: Sequence[Session], body: bytes) -> None:
        assert len(set(map(id, sessions))) == len(sessions)
        for session in sessions:
            self.answer(session, 0, body)

    def journal(self, record: Record, handles: Sequence[int]) -> None:
        assert set(handles) <= self.open
        drawn = sum(
            change.count + change.guarded if isinstance(change, Put) else isinstance(change, Grant)
            for change in record.changes
        )
        assert drawn == len(handles)
        if self.broken:
            raise KeeperUnavailable("a test")
        if self.busy:
            raise JournalBusy
        self.keeper.apply(decode_record(encode_record(record)), list(handles))

    def lease_pair(self) -> tuple[int, int]:
        if self.full:
            raise DescriptorLimit(24, "RLIMIT_NOFILE", 10, None, "server")
        ours, theirs = self.new_handles(2)
        self.leases[ours] = "held"
        self.lease_of[theirs] = ours
        return ours, theirs

    def lease_state(self, ours: int, *, revoke: bool = False) -> LeaseState:
        assert ours in self.open
        if revoke:
            self.revoked.add(ours)
            if self.leases[ours] == "held":
                self.leases[ours] = "dropped"
        return self.leases[ours]

    def moved_leases(self) -> list[int]:
        leases = [(id, entry.lease) for id, entry in self.table.leases.items()]
        return [id for id, lease in leases if lease and self.leases[lease.handle] != "held"]

    def check_lifeline(self, handle: int) -> None:
        assert handle in self.open

    def owner_guard(self, session: Session) -> int:
        if self.full:
            raise DescriptorLimit(24, "RLIMIT_NOFILE", 10, None, "server")
        return self.new_handles(1)[0]

    def registrant(self, session: Session) -> m.Registrant:
        return m.Registrant(session.pid, session.subject.uid, session.subject.gid, "test")

    def watch(self, entry: Entry) -> None:
        assert self.table.entries[entry.name] is entry
        assert set(entry.all_handles()) <= self.open
        self.watched.append(entry)

    def close(self, handles: Sequence[int], *, when_sent: bool = False) -> None:
        for handle in handles:
            self.open.remove(handle)  # KeyError: closed twice

    def close_removed(
        self, handles: Sequence[int], ends: Sequence[int], then: Callable[[], None] | None
    ) -> None:
        self.close([*handles, *ends])
        if then is not None:
            then()

    def inspect(self, session: Session, id: int, entries: Sequence[Entry], now: float) -> None:
        raise NotImplementedError

    def bind(self, session: Session, request: m.Bind) -> tuple[m.Kind, int]:
        return KIND, self.new_handles(1)[0]

    def is_reached(self, address: str, handle: int) -> bool:
        return handle in self.reached

    def stats(self) -> m.ServerStats:
        raise NotImplementedError

    def reload_policy(self) -> None:
        pass

    def command(self, verb: str, session: Session, id: int) -> bool:
        return True

    def audit(
        self, verb: str, name: str | tuple[str, ...], session: Session | None, outcome: str
    ) -> None:
        pass

    def audit_refusal(self, verb: str, name: str, session: Session, outcome: str) -> None:
        pass


KIND = m.Kind("descriptor", msgspec.Raw(b"\xc0"))


class Everybody(Policy):
    """Lets everybody do everything, but for the registrant rule."""

    def decide(self, verb: str, name: str, subject: Subject) -> Decision:
        return Decision(True, "all")


_ids = itertools.count(1001)  # of requests for which the test has none


def register(
    effects: MemoryEffects, session: Session, name: str = "x", count: int = 1, **fields: Any
) -> Any:
    """The reply. Raises the refusal; the handles are closed then."""
    handles = effects.new_handles(count)
    id, now = fields.pop("id", next(_ids)), fields.pop("now", 0.0)
    try:
        kept = effects.service.handle(session, id, m.Register(name, KIND, **fields), handles, now)
    except BaseException:
        effects.close(handles)
        raise
    if not kept:
        effects.close(handles)
    return session.route.sent.pop(0)[1]
