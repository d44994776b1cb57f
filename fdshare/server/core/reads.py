"""The verbs that do not change the table. A handler answers, or keeps the request waiting."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from fdshare.errors import FetchTimeout, NameNotFound
from fdshare.protocol import messages as m
from fdshare.protocol.framing import MAX_FRAME, MAX_FRAME_DESCRIPTORS
from fdshare.protocol.names import MAX_NAME, matcher
from fdshare.server.core.policy import Policy, Subject
from fdshare.server.core.ports import Effects, Session
from fdshare.server.core.table import Entry, Handle, Table
from fdshare.server.core.transactions import DONE
from fdshare.server.core.waiters import PART, Waiters
from fdshare.server.limits import Limits

__all__ = ["GivenTogether", "Reads"]

# Of what is kept until the table changes: so many lists of names, of so many bytes each.
_TOGETHER: Final = 64
_LONGEST: Final = 1 << 16

_ITEM: Final = MAX_NAME + 128  # bytes of a GivenItem beside its kind, at most


@dataclass(slots=True)
class GivenTogether:
    """What answers a fetch of many names, as an Entry has it of one: *reply* is encoded, *prepared*
    the same as the event loop sends it."""

    names: tuple[str, ...]
    entries: list[Entry]
    handles: tuple[Handle, ...]
    reply: bytes
    prepared: object = None


class Reads(Waiters):
    """fetch, wait, watch, and what only asks."""

    def __init__(self, table: Table, policy: Policy, limits: Limits, effects: Effects) -> None:
        super().__init__(table, policy, limits, effects)
        self._together: dict[tuple[str, ...], GivenTogether] = {}
        self._together_at = -1  # the serial of the table at which they were made

    _listed: Sequence[bytes] = ()  # what answers `names` of all of them ...
    _listed_at = -1  # ... at that serial

    def fetch_again(
        self, session: Session, name: str | tuple[str, ...]
    ) -> Entry | GivenTogether | None:
        """The entry to give, counted as fetched, if a trusted client fetches a visible name that
        was fetched before: nine requests of ten are such. So for the names of a fetch of many, as
        long as nothing changes. None otherwise: call `handle`."""
        if not isinstance(name, str):
            return self._fetch_many_again(session, name)
        entry = self.table.entries.get(name)
        if entry is None or not entry.reply or entry.lease is not None or not session.trusted:
            return None
        if self.effects.strict and self.effects.audit_is_full():
            return None
        entry.fetches += 1
        counters = self.counters
        counters["fetched"] += 1
        counters["requests"] += 1
        if self.effects.auditing:
            self.effects.audit("fetch", name, session, "given")
        return entry

    def _fetch_many_again(self, session: Session, names: tuple[str, ...]) -> GivenTogether | None:
        # Every change of what is visible has a serial of its own.
        if self._together_at != self.table.serial or not session.trusted:
            return None
        given = self._together.get(names)
        if given is None or (self.effects.strict and self.effects.audit_is_full()):
            return None
        self.counters["requests"] += 1
        self._count_together(session, given)
        return given

    def _count_together(self, session: Session, given: GivenTogether) -> None:
        for entry in given.entries:
            entry.fetches += 1
        self.counters["fetched"] += len(given.entries)
        if self.effects.auditing:
            self.effects.audit("fetch", given.names, session, "given")

    def _found(
        self, session: Session, id: int, request: m.Fetch | m.Follow | m.Wait, now: float
    ) -> Entry | None:
        """The entry that *request* asks for; None: it waits for that."""
        self._permit("fetch", request.name, session)
        entry = self._present(request.name, now)
        if entry is None:
            self._wait_for(session, id, request, now)
        return entry

    def _fetch(
        self, session: Session, id: int, request: m.Fetch, handles: list[Handle], now: float
    ) -> bool:
        entry = self._found(session, id, request, now)
        if entry is not None:
            self._give(session, id, entry, counts=not request.look)
        return False

    def _follow(
        self, session: Session, id: int, request: m.Follow, handles: list[Handle], now: float
    ) -> bool:
        entry = self._found(session, id, request, now)
        if entry is not None:
            self._give_followed(session, id, request, entry)
        return False

    def _fetch_many(
        self, session: Session, id: int, request: m.FetchMany, handles: list[Handle], now: float
    ) -> bool:
        entries = {}  # each once
        missing = {}
        for index, name in enumerate(request.names):
            self._permit("fetch", name, session)
            entry = self._present(name, now)
            if entry is None:
                missing[index] = name
            else:
                entries[name] = entry
        if missing:
            # Not as a refusal, which would have the names: the client knows them.
            self.refused(session, request, NameNotFound(list(missing.values())))
            self.effects.answer(session, id, m.encode(m.GivenMany([], list(missing))))
            return False
        given = self._give_together(entries.values())
        self.effects.answer(session, id, given.reply, given.handles)
        self._count_together(session, given)
        self._remember_together(tuple(request.names), given)
        return False

    def _give_together(self, entries: Iterable[Entry]) -> GivenTogether:
        """As many of *entries*, from the first, as one frame can carry."""
        room = min(MAX_FRAME_DESCRIPTORS, self.limits.in_flight_per_connection)
        given: list[Entry] = []
        handles: list[Handle] = []
        size = _ITEM
        for entry in entries:
            kind = entry.put.kind
            size += len(kind.tag.encode()) + len(kind.spec) + _ITEM
            if handles and (len(handles) + len(entry.handles) > room or size > MAX_FRAME):
                break
            given.append(entry)
            handles += entry.handles
        items = [m.GivenItem(e.name, e.generation, e.put.kind, len(e.handles)) for e in given]
        names = tuple(entry.name for entry in given)
        return GivenTogether(names, given, tuple(handles), m.encode(m.GivenMany(items)))

    def _remember_together(self, names: tuple[str, ...], given: GivenTogether) -> None:
        if self._together_at != self.table.serial or len(self._together) >= _TOGETHER:
            self._together.clear()
            self._together_at = self.table.serial
        if len(given.reply) <= _LONGEST:
            self._together[names] = given

    def _wait(
        self, session: Session, id: int, request: m.Wait, handles: list[Handle], now: float
    ) -> bool:
        entry = self._found(session, id, request, now)
        if entry is not None:
            self.effects.answer(session, id, m.encode(m.Registered(entry.name, entry.generation)))
        return False

    def _watch(
        self, session: Session, id: int, request: m.Watch, handles: list[Handle], now: float
    ) -> bool:
        self._permit("watch", "", session)
        self._check_waiting(session, id)
        self._check_watches(session.user, request.pattern)
        self._settle_all(now)
        self._start_watching(session, id, request.pattern)
        self.snapshot(session, id)
        return False

    def _cancel(
        self, session: Session, id: int, request: m.Cancel, handles: list[Handle], now: float
    ) -> bool:
        waiter = session.waiting.get(request.target)
        if waiter is not None:
            self._give_up(waiter, FetchTimeout(waiter.request.name, 0.0))
        elif request.target in session.watches:
            self._stop_watching(session, request.target)
            self.effects.answer(session, request.target, DONE)
        return False

    def _names(
        self, session: Session, id: int, request: m.Names, handles: list[Handle], now: float
    ) -> bool:
        self._permit("list", "", session)
        self._settle_all(now)
        if request.pattern == "*":
            # Every change of what is visible has a serial of its own.
            if self._listed_at != self.table.serial:
                self._listed, self._listed_at = self._name_lists("*"), self.table.serial
            lists = self._listed
        else:
            lists = self._name_lists(request.pattern)
        self.effects.answer_in_parts(session, id, lists)
        return False

    def _name_lists(self, pattern: str) -> list[bytes]:
        """The answer to `names`, in parts."""
        matches = matcher(pattern)
        names = sorted(n for n, e in self.table.entries.items() if not e.lease and matches(n))
        parts = range(0, max(len(names), 1), PART)
        return [m.encode(m.NameList(names[i : i + PART], i + PART < len(names))) for i in parts]

    def _info(
        self, session: Session, id: int, request: m.Info, handles: list[Handle], now: float
    ) -> bool:
        self._permit("info", request.name, session)
        self._present(request.name, now)
        entry = self.table.entries.get(request.name)
        if entry is None:
            raise NameNotFound(request.name)
        self.effects.inspect(session, id, [entry], now)
        return False

    def _infos(
        self, session: Session, id: int, request: m.Infos, handles: list[Handle], now: float
    ) -> bool:
        self._permit("list", "", session)
        self._settle_all(now)
        matches = matcher(request.pattern)
        found = sorted(n for n in self.table.entries if matches(n))
        self.effects.inspect(session, id, [self.table.entries[n] for n in found], now)
        return False

    def _explain(
        self, session: Session, id: int, request: m.Explain, handles: list[Handle], now: float
    ) -> bool:
        self._permit("explain", request.name, session)
        subject = Subject(request.uid, request.gid, tuple(request.groups))
        allowed, rule = self.policy.decide(request.verb, request.name, subject)
        entry = self.table.entries.get(request.name)
        # Registering a name that is held replaces the entry: the registrant rule decides that, too.
        if allowed and entry and request.verb in ("register", "unregister"):
            allowed, rule = self.policy.decide_removal(entry.put.registrant.uid, subject)
        self.effects.answer(session, id, m.encode(m.Explained(allowed, rule)))
        return False

    def _stats(
        self, session: Session, id: int, request: m.Stats, handles: list[Handle], now: float
    ) -> bool:
        self._permit("stats", "", session)
        self._settle_all(now)
        self.effects.answer(session, id, m.encode(m.StatsReply(self.effects.stats())))
        return False

    def _ping(
        self, session: Session, id: int, request: m.Ping, handles: list[Handle], now: float
    ) -> bool:
        self.effects.answer(session, id, DONE)
        return False
