"""The verbs that change the table. Each has one fixed order: check the shape, check the permission,
settle the lease of the name, check quota and clash, write the record; only then change the table
and answer the client.
"""

from __future__ import annotations

from typing import Final

from fdshare.errors import (
    GenerationMismatch,
    InvalidArgument,
    NameNotFound,
    NameTaken,
    TooManyDescriptors,
)
from fdshare.protocol import messages as m
from fdshare.protocol.names import MAX_ENTRY_DESCRIPTORS
from fdshare.server.core.ports import Session
from fdshare.server.core.records import Change, Drop, Move, Put, Record
from fdshare.server.core.table import Entry, Handle
from fdshare.server.core.transactions import DONE
from fdshare.server.core.waiters import Waiters

__all__ = ["ADDRESS", "Writes"]

# The key in the metadata of what the server has bound: the address, as it was asked for.
ADDRESS: Final = "address"


class Writes(Waiters):
    """register, take, unregister, rename and bind."""

    def _register(
        self, session: Session, id: int, request: m.Register, handles: list[Handle], now: float
    ) -> bool:
        if self._answered_before(session, id):
            return False
        own = len(handles) - (request.lifetime == "connection")
        if own < 1:
            raise InvalidArgument("descriptors", "an entry has at least one")
        if own > MAX_ENTRY_DESCRIPTORS:
            raise TooManyDescriptors(own, MAX_ENTRY_DESCRIPTORS)
        if not session.trusted:
            self._permit("register", request.name, session)
        self._check_remembered(session, now)
        changes = self._make_way(session, request, handles, now)
        generation = self.table.generation + 1
        put = Put(
            name=request.name,
            generation=generation,
            kind=request.kind,
            count=own,
            registrant=session.registrant or self._registrant(session),
            at=now,
            lifetime=request.lifetime,
            guarded=request.lifetime != "server",
            expires=None if request.ttl is None else now + request.ttl,
            grace=request.grace,
            drop_on_hangup=request.drop_on_hangup,
            metadata=request.metadata,
        )
        reply = m.encode(m.Registered(request.name, generation))
        extra = [self.effects.owner_guard(session)] if request.lifetime == "process" else []
        record = Record([*changes, put], session.name, id, reply)
        try:
            self._commit(record, handles + extra, now, session)
        except BaseException:
            self.effects.close(extra)
            raise
        self.counters["registered"] += 1
        session.holds = session.holds or request.lifetime != "server"
        if self.effects.auditing:
            self.effects.audit("register", request.name, session, f"generation {generation}")
        return True

    def _make_way(
        self, session: Session, request: m.Register, handles: list[Handle], now: float
    ) -> list[Change]:
        """What has to be changed with the new entry: the lease that is on its name.

        Raises: whatever refuses the entry: a clash, its lifeline, a quota.
        """
        count = len(handles) + (request.lifetime == "process")
        if self.table.leases:
            self._settle_if_crowded(session, count, now)
        former = self.table.entries.get(request.name)
        changes = self._settle(former) if former else []
        if changes and self._is_taken(changes):
            former = None
        if former is not None or request.if_generation is not None:
            self._check_clash(request, former, session)
        if request.lifetime == "connection":
            self.effects.check_lifeline(handles[-1])
        self._check_quota(session, count, former)
        if former is not None and former.lease is not None and not changes:
            changes = self._settle(former, revoke=True)
            if self._is_taken(changes):  # the taker has confirmed since the first look
                self._check_clash(request, None, session)
        return changes

    def _check_clash(self, request: m.Register, former: Entry | None, session: Session) -> None:
        wanted = request.if_generation
        current = former.generation if former else 0
        if wanted is not None and wanted != current:
            raise GenerationMismatch(request.name, wanted, current)
        if former is None:
            return
        if wanted is None and not request.replace:
            raise NameTaken(request.name, former.generation)
        self._permit_removal("register", former, session)

    def _answered_before(self, session: Session, id: int) -> bool:
        """True if the request is a repeat: then its client was sent its first answer again."""
        # A client without a session id repeats nothing, and must not get the answer of another.
        answers = self.table.answers.get(session.name) if session.name else None
        known = answers.get(id) if answers else None
        if known is None:
            return False
        self.effects.answer(session, id, known)
        return True

    def _take(
        self, session: Session, id: int, request: m.Take, handles: list[Handle], now: float
    ) -> bool:
        self._permit("take", request.name, session)
        entry = self._present(request.name, now)
        if entry is None:
            self._wait_for(session, id, request, now)
            return False
        self._lease(session, id, entry, now)
        return False

    def _unregister(
        self, session: Session, id: int, request: m.Unregister, handles: list[Handle], now: float
    ) -> bool:
        if self._answered_before(session, id):
            return False
        self._permit("unregister", request.name, session)
        self._check_remembered(session, now)
        entry = self.table.entries.get(request.name)
        changes = self._settle(entry) if entry else []
        if entry is None or self._is_taken(changes):
            raise NameNotFound(request.name)
        wanted = request.if_generation
        if wanted is not None and wanted != entry.generation:
            raise GenerationMismatch(request.name, wanted, entry.generation)
        self._permit_removal("unregister", entry, session)
        if entry.lease is not None and not changes:
            changes = self._settle(entry, revoke=True)
            if self._is_taken(changes):
                self._commit(Record(changes), [], now)
                raise NameNotFound(request.name)
        changes.append(Drop(entry.name, entry.generation, "unregistered"))
        record = Record(changes, session.name, id, DONE)
        self._commit(record, [], now, session)
        self.effects.audit("unregister", request.name, session, "removed")
        return False

    def _rename(
        self, session: Session, id: int, request: m.Rename, handles: list[Handle], now: float
    ) -> bool:
        if self._answered_before(session, id):
            return False
        self._permit("unregister", request.old, session)
        self._permit("register", request.new, session)
        self._check_remembered(session, now)
        entry = self._present(request.old, now)
        if entry is None:
            raise NameNotFound(request.old)
        self._permit_removal("unregister", entry, session)
        self._present(request.new, now)
        clash = self.table.entries.get(request.new)
        if clash is not None:
            raise NameTaken(request.new, clash.generation)
        generation = self.table.generation + 1
        reply = m.encode(m.Registered(request.new, generation))
        record = Record([Move(request.old, request.new, generation)], session.name, id, reply)
        self._commit(record, [], now, session)
        self.effects.audit("rename", request.old, session, f"to {request.new}")
        return False

    def _bind(
        self, session: Session, id: int, request: m.Bind, handles: list[Handle], now: float
    ) -> bool:
        self._permit("fetch", request.name, session)
        entry = self._present(request.name, now)
        if entry is None or entry.generation == request.replaces:
            entry = self._bind_new(session, request, entry, now)
        self._give(session, id, entry)
        return False

    def _bind_new(
        self, session: Session, request: m.Bind, former: Entry | None, now: float
    ) -> Entry:
        self._permit("bind", request.address, session)
        self._permit("register", request.name, session)
        if former is not None:
            self._permit_removal("register", former, session)
            # The client may have a mount namespace of its own, in which the path is not there.
            if self.effects.is_reached(request.address, former.handles[0]):
                return former
        elif clash := self.table.entries.get(request.name):  # it is leased
            raise NameTaken(request.name, clash.generation)
        if self.table.leases:
            self._settle_if_crowded(session, 1, now)
        self._check_quota(session, 1, former)
        kind, handle = self.effects.bind(session, request)
        generation = self.table.generation + 1
        put = Put(
            name=request.name,
            generation=generation,
            kind=kind,
            count=1,
            registrant=self._registrant(session),
            at=now,
            metadata={ADDRESS: request.address},
        )
        try:
            self._commit(Record([put]), [handle], now)
        except BaseException:
            self.effects.close([handle])
            raise
        self.effects.audit("bind", request.name, session, request.address)
        return self.table.entries[request.name]
