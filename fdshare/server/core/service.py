"""What the server does with a request: (session, request, now) -> calls of `Effects`. No I/O.

Theory of operation. Every handler goes in one fixed order: shape, permission, leases of the name
settled, quota, clash; then it *plans* a `Record`, which is journaled and then applied to the table;
only then the client is answered, waiting requests are served and watchers are told. A handler
raises a FdshareError to refuse, or `JournalBusy` to be called again with the same request later:
nothing has changed then. The caller of `handle` owns the request's handles again unless it returned
True.

The event loop is told which handles to watch and which to close. It may report something that has
changed since: every call names the entry or the lease, and what is not in the table any more is
ignored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Literal

from fdshare.errors import FdshareError, InvalidArgument, TooManyDescriptors
from fdshare.protocol import messages as m
from fdshare.server.core.policy import Policy
from fdshare.server.core.ports import Effects, JournalBusy, Session
from fdshare.server.core.reads import Reads
from fdshare.server.core.records import Drop, Linger, Record
from fdshare.server.core.table import Entry, Handle, Table
from fdshare.server.core.transactions import DONE
from fdshare.server.core.writes import Writes
from fdshare.server.limits import Limits

__all__ = ["Service"]

_WHEN_CLOSED: Final = frozenset((m.Ping, m.Stats, m.Explain, m.Cancel, m.Shutdown))

_AUDITED: Final = frozenset(
    (m.Register, m.Fetch, m.Take, m.Follow, m.FetchMany, m.Unregister, m.Rename, m.Bind)
)

_AT_ONCE: Final = 64  # clients that are forgotten in one turn of the loop, with a record each


class Service(Reads, Writes):
    """The verbs, over one table and one policy; what they need done is asked of *effects*."""

    def __init__(self, table: Table, policy: Policy, limits: Limits, effects: Effects) -> None:
        super().__init__(table, policy, limits, effects)
        self.leaving = False  # the server ends: what is remembered is for its successor
        self.closed = ""  # why nobody is served
        self._handlers: dict[type, Callable[..., bool]] = {
            m.Fetch: self._fetch,
            m.Take: self._take,
            m.Wait: self._wait,
            m.Follow: self._follow,
            m.FetchMany: self._fetch_many,
            m.Register: self._register,
            m.Unregister: self._unregister,
            m.Rename: self._rename,
            m.Bind: self._bind,
            m.Names: self._names,
            m.Info: self._info,
            m.Infos: self._infos,
            m.Watch: self._watch,
            m.Cancel: self._cancel,
            m.Explain: self._explain,
            m.Stats: self._stats,
            m.Ping: self._ping,
            m.Shutdown: self._command,
            m.Upgrade: self._command,
            m.Reload: self._reload,
        }

    # What the event loop calls.

    def handle(
        self, session: Session, id: int, request: m.AnyRequest, handles: list[Handle], now: float
    ) -> bool:
        """Answers *request*, now or later. True if *handles* now belong to the table.

        Raises: FdshareError, to be sent as the refusal; JournalBusy, to be called again.
        """
        self.counters["requests"] += 1
        handler = self._handlers.get(type(request))
        if handler is None:
            raise InvalidArgument("request", f"a {type(request).__name__} is not expected here")
        request.check()
        if self.closed and type(request) not in _WHEN_CLOSED:
            raise FdshareError(self.closed)
        if self.effects.strict and type(request) in _AUDITED:
            self._check_audit()
        if handles and type(request) is not m.Register:
            raise TooManyDescriptors(len(handles), 0)
        return handler(session, id, request, handles, now)

    def disconnected(self, session: Session, now: float, *, unanswered: bool = False) -> None:
        """The client's connection has ended: its waits and watches end. *unanswered*: it cannot
        have read all of its answers, so it may reconnect and repeat the requests."""
        for waiter in list(session.waiting.values()):
            self._stop_waiting(waiter)
        for id in list(session.watches):
            self._stop_watching(session, id)
        if not self.remembered.has_left(session.name) or self.leaving:
            return
        if not unanswered:
            try:
                self._forget(session.name, now)
                return
            except (JournalBusy, FdshareError):
                pass  # it is forgotten later
        self.remembered.keep(session, now + self.limits.session_timeout)

    def hung_up(self, entry: Entry, now: float, *, guard: bool) -> None:
        """The owner of *entry* is gone (*guard*), or the peer of one of its descriptors."""
        if self.table.entries.get(entry.name) is not entry:
            return
        changes = self._settle(entry, revoke=not guard or not entry.put.grace)
        if self._is_taken(changes):
            self._commit(Record(changes), [], now)
            return
        if guard and entry.put.grace:
            until = now + entry.put.grace
            if entry.expires is not None:  # the grace does not prolong the time to live
                until = min(until, entry.expires)
            changes.append(Linger(entry.name, entry.generation, until))
        else:
            changes.append(Drop(entry.name, entry.generation, "hung_up"))
        self._commit(Record(changes), [], now)

    def lease_moved(self, lease: int, now: float) -> None:
        """The taker has confirmed, or closed its end."""
        entry = self.table.leases.get(lease)
        if entry is None:
            return
        changes = self._settle(entry)
        if changes:
            self._commit(Record(changes), [], now)

    def tick(self, now: float) -> None:
        """Does everything that is due at *now*: expiries, leases held too long, waits that are
        over."""
        self._end_waits(now)
        for entry in self.table.expired(now):
            if self.table.entries.get(entry.name) is not entry:
                continue  # another deadline at the same time has removed it
            changes = self._settle(entry, revoke=True)
            if not self._is_taken(changes):
                changes = [Drop(entry.name, entry.generation, "expired")]
                self.counters["expired"] += 1
            self._commit(Record(changes), [], now)
        for _ in range(_AT_ONCE):
            if (client := self.remembered.due(now)) is None:
                break
            self._forget(client, now)
        for entry in self._leases_too_old(now):
            if changes := self._settle(entry, revoke=True):
                self._commit(Record(changes), [], now)

    def next_deadline(self) -> float | None:
        """When to call `tick` next; None if nothing is due."""
        table = self.table
        if not (
            self._wait_deadlines
            or self._unserved
            or self.remembered.absent
            or table.deadlines
            or table.leases
        ):
            return None
        due = list(self._unserved.values())
        if (wait := self._next_wait()) is not None:
            due.append(wait)
        if (expiry := self.table.next_deadline()) is not None:
            due.append(expiry)
        if self.remembered.absent:
            due.append(next(iter(self.remembered.absent.values())))
        if self.table.leases:
            oldest = next(iter(self.table.leases.values()))
            if oldest.lease is not None:
                due.append(oldest.lease.at + self.limits.lease_timeout)
        return min(due, default=None)

    def expect(self, now: float) -> None:
        """After the death of a server: its clients, whose answers are remembered, have the session
        timeout to reconnect."""
        self.remembered.expect(now + self.limits.session_timeout)

    def greeted(self, session: Session) -> None:
        """The client of *session* has connected, or reconnected."""
        self.remembered.arrived(session)

    # Verbs for the server itself.

    def _reload(
        self, session: Session, id: int, request: m.Reload, handles: list[Handle], now: float
    ) -> bool:
        self._permit("reload", "", session)
        self.effects.reload_policy()
        self.effects.answer(session, id, DONE)
        return False

    def _command(
        self,
        session: Session,
        id: int,
        request: m.Shutdown | m.Upgrade,
        handles: list[Handle],
        now: float,
    ) -> bool:
        verb: Literal["shutdown", "upgrade"] = (
            "shutdown" if type(request) is m.Shutdown else "upgrade"
        )
        self._permit(verb, "", session)
        if self._answered_before(session, id):  # this server is the successor that was asked for
            return False
        if self.effects.command(verb, session, id):
            self.effects.answer(session, id, DONE)
        return False
