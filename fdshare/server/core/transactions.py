"""Transactions: the steps that the verbs share. They check permission and room, settle leases, and
commit a record: it is journaled, then applied to the table, and then everybody concerned is told.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Final

from fdshare.errors import AccessDenied, LogFull, QuotaExceeded
from fdshare.protocol import messages as m
from fdshare.server.core.policy import Policy
from fdshare.server.core.ports import Effects, Session
from fdshare.server.core.records import Change, Forget, Grant, Record, Settle
from fdshare.server.core.remembered import Remembered
from fdshare.server.core.slots import Slots
from fdshare.server.core.table import Entry, Handle, Table, Usage, usage_of
from fdshare.server.core.users import User, allowance
from fdshare.server.limits import Limits

__all__ = ["DONE", "Transactions"]

DONE = m.encode(m.Done())

# Clients that are forgotten for one change where their user has too many. What two had is more than
# a change brings.
_FORGOTTEN: Final = 2


class Transactions:
    """One table and one policy; what has to be done is asked of *effects*."""

    def __init__(self, table: Table, policy: Policy, limits: Limits, effects: Effects) -> None:
        self.table = table
        self.policy = policy
        self.limits = limits
        self.effects = effects
        self.slots = Slots(effects.page)
        self.remembered = Remembered(table, limits)
        self.counters = dict.fromkeys(
            ("requests", "refused", "registered", "fetched", "taken", "returned", "expired"), 0
        )

    # Committing, and giving.

    def _commit(
        self,
        record: Record,
        handles: Sequence[Handle],
        now: float,
        session: Session | None = None,
    ) -> None:
        """Journals *record*, applies it, and then tells everybody whom it concerns. The *session*
        that asked for it is sent the reply in it when all that it removed is closed."""
        self.effects.journal(record, handles)
        applied = self.table.apply(record, list(handles))
        for entry in applied.changed:
            self.effects.watch(entry)
        self.slots.changed(applied.events)  # before anybody hears of it
        answer = None
        if session is not None:
            if session.name:
                self.remembered.recount(session)
            session.owed += 1
            answer = partial(self._answer_change, session, record)
        if applied.closed or applied.ended:
            self.effects.close_removed(applied.closed, applied.ended, answer)
        elif answer is not None:
            answer()
        self._happened(applied.events, now)

    def _answer_change(self, session: Session, record: Record) -> None:
        session.owed -= 1
        self.effects.answer(session, record.id, record.reply)

    def _forget(self, client: str, now: float) -> None:
        self._commit(Record([Forget(client)]), [], now)
        self.remembered.forgotten(client)

    def _happened(self, events: Sequence[m.Event], now: float) -> None:
        """Called with the events of each record, when it has been applied."""
        raise NotImplementedError

    def _check_audit(self) -> None:
        """Raises: LogFull: what happens next would not be in the audit log."""
        if self.effects.audit_is_full():
            raise LogFull

    def _give(self, session: Session, id: int, entry: Entry, *, counts: bool = True) -> None:
        """Answers a fetch; *counts*: it is one of the entry's. The body of the reply is the same
        for all clients: it is encoded once."""
        if not entry.reply:
            given = m.Given(entry.name, entry.generation, entry.put.kind, entry.put.metadata)
            entry.reply = m.encode(given)
        entry.fetches += counts
        self.counters["fetched"] += 1
        self.effects.answer(session, id, entry.reply, entry.handles)
        self.effects.audit("fetch", entry.name, session, "given")

    def _give_followed(self, session: Session, id: int, request: m.Follow, entry: Entry) -> None:
        """Answers a follow: with the entry, unless the client has it, and with where to look."""
        place, page = self.slots.place(entry.name), self.slots.page
        known = request.known == entry.generation and request.epoch == self.effects.epoch
        followed = m.Followed(entry.generation, *place)
        handles: list[Handle] = []
        if not known:
            followed.kind = entry.put.kind
            handles += entry.handles
            entry.fetches += 1
            self.counters["fetched"] += 1
            self.effects.audit("fetch", entry.name, session, "given")
        if page is not None and place.slot:
            followed.page = page.id
            if request.page != page.id:
                followed.mapped = True
                handles.append(page.handle)
        self.effects.answer(session, id, m.encode(followed), handles)

    def _lease(self, session: Session, id: int, entry: Entry, now: float) -> None:
        """Answers with the entry and the taker's end of a new lease on it, which counts against the
        taker."""
        self._check_lease(session, entry, now)
        ours, theirs = self.effects.lease_pair()
        lease = self.table.last_lease + 1
        try:
            self._commit(Record([Grant(entry.name, lease, now, session.user.uid)]), [ours], now)
        except BaseException:
            self.effects.close([ours, theirs])
            raise
        given = m.Given(
            entry.name, entry.generation, entry.put.kind, entry.put.metadata, lease=True
        )
        entry.fetches += 1
        self.counters["taken"] += 1
        self.effects.audit("take", entry.name, session, f"leased {lease}")
        self.effects.answer(session, id, m.encode(given), [*entry.handles, theirs])
        # It is open until it is sent; after that the taker's end must not stay open here.
        self.effects.close([theirs], when_sent=True)

    # Leases.

    def _present(self, name: str, now: float) -> Entry | None:
        """The entry that is visible under *name*, after its lease was settled if the taker
        decided."""
        entry = self.table.entries.get(name)
        if entry is None or entry.lease is None:
            return entry
        changes = self._settle(entry)
        if changes:
            self._commit(Record(changes), [], now)
        return self.table.visible(name)

    def _settle_all(self, now: float) -> None:
        for lease in self.effects.moved_leases():
            entry = self.table.leases.get(lease)
            if entry is not None and (changes := self._settle(entry)):
                self._commit(Record(changes), [], now)

    def _settle_if_crowded(self, session: Session, count: int, now: float) -> None:
        """Settles all leases if there may be no room for *count* descriptors: what takers have
        confirmed makes room."""
        try:
            self._check_quota(session, count, None)
        except QuotaExceeded:
            self._settle_all(now)

    def _settle(self, entry: Entry, *, revoke: bool = False) -> list[Change]:
        """What the taker of *entry* has decided, as changes; none if it is not leased, or has not
        decided."""
        if entry.lease is None:
            return []
        state = self.effects.lease_state(entry.lease.handle, revoke=revoke)
        if state == "held":
            return []
        return [Settle(entry.lease.id, "taken" if state == "confirmed" else "returned")]

    @staticmethod
    def _is_taken(changes: Sequence[Change]) -> bool:
        return any(isinstance(change, Settle) and change.outcome == "taken" for change in changes)

    def _leases_too_old(self, now: float) -> list[Entry]:
        before = now - self.limits.lease_timeout
        old = []
        for entry in self.table.leases.values():
            if entry.lease is None or entry.lease.at > before:
                break
            old.append(entry)
        return old

    # Permission and room.

    def _permit(self, verb: str, name: str, session: Session) -> None:
        if session.trusted:
            return
        allowed, rule = self.policy.decide(verb, name, session.subject)
        if not allowed:
            raise AccessDenied(verb, name, session.subject.uid, rule)

    def _permit_removal(self, verb: str, entry: Entry, session: Session) -> None:
        if session.trusted:
            return
        allowed, rule = self.policy.decide_removal(entry.put.registrant.uid, session.subject)
        if not allowed:
            raise AccessDenied(verb, entry.name, session.subject.uid, rule)

    def _check_quota(self, session: Session, count: int, former: Entry | None) -> None:
        """Refuses what would exceed a limit. What the replaced entry *former* frees counts as
        free."""
        limits, table, user = self.limits, self.table, session.user
        names = len(table.entries) - (former is not None)
        if names + 1 > limits.max_names:
            raise QuotaExceeded("max_names", limits.max_names, names)
        used = table.descriptors - (len(former.all_handles()) if former else 0)
        if used + count > limits.max_descriptors:
            raise QuotaExceeded("max_descriptors", limits.max_descriptors, used)
        if user.trusted:
            return
        usage = table.usage(user.uid)
        freed = usage_of(former, user.uid) if former else Usage()
        mine = usage.names - freed.names
        share = allowance(limits.max_names_per_uid, limits.max_names, names - mine)
        self._quota("max_names_per_uid", share, mine, 1)
        mine = usage.descriptors - freed.descriptors
        share = allowance(limits.max_descriptors_per_uid, limits.max_descriptors, used - mine)
        self._quota("max_descriptors_per_uid", share, mine, count)

    def _check_remembered(self, session: Session, now: float) -> None:
        """Forgets clients that are absent for longest where too much is remembered for their user.
        Refuses the change where all of that is for clients that are here."""
        for _ in range(_FORGOTTEN):
            refusal = self.remembered.refusal(session.user)
            if refusal is None:
                return
            client = self.remembered.longest_absent(session.user.uid)
            if client is None:
                raise refusal
            self._forget(client, now)

    def _check_lease(self, session: Session, entry: Entry, now: float) -> None:
        """Refuses a lease too many. A uid that takes its own entry frees that one's descriptors."""
        if session.trusted:
            return
        freed = usage_of(entry, session.user.uid).descriptors
        try:
            self._quota_of_lease(session.user, freed)
        except QuotaExceeded:
            self._settle_all(now)
            self._quota_of_lease(session.user, freed)

    def _quota_of_lease(self, user: User, freed: int) -> None:
        limits, used = self.limits, self.table.usage(user.uid).descriptors
        others = self.table.descriptors - used
        share = allowance(limits.max_descriptors_per_uid, limits.max_descriptors, others)
        self._quota("max_descriptors_per_uid", share, used - freed, 1)

    @staticmethod
    def _quota(what: str, limit: int, used: int, more: int) -> None:
        if used + more > limit:
            raise QuotaExceeded(what, limit, used)

    def _registrant(self, session: Session) -> m.Registrant:
        if session.registrant is None:
            session.registrant = self.effects.registrant(session)
        return session.registrant
