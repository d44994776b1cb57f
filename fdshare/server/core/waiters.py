"""Waiters: requests that wait for a name, and watches. Both are served when a change was applied.

A request that waits is kept under its name, in the order of arrival, with its deadline in a heap.
A watch is sent a snapshot and then events; each event is encoded once for all watches.
Both were allowed when they began. Another policy asks about each of them again.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Sequence
from itertools import count

from fdshare.errors import (
    AccessDenied,
    FdshareError,
    FetchTimeout,
    InvalidArgument,
    NameNotFound,
)
from fdshare.protocol import messages as m
from fdshare.protocol.names import MAX_NAME, has_wildcards, matcher
from fdshare.protocol.subscriptions import Subscriptions
from fdshare.server.core.policy import Policy
from fdshare.server.core.ports import Awaiting, Effects, JournalBusy, Session, Waiter
from fdshare.server.core.table import Table
from fdshare.server.core.transactions import Transactions
from fdshare.server.core.users import User
from fdshare.server.limits import Limits

__all__ = ["PART", "Waiters"]

PART = 1000  # names or entries in one part of a long answer
_AT_ONCE = 64  # waits that are served or end in one turn of the loop
_AGAIN = 0.01  # seconds until the waiters of a name that could not be served are tried again


class Waiters(Transactions):
    """Transactions that clients wait for: those that want a name, and the watchers."""

    def __init__(self, table: Table, policy: Policy, limits: Limits, effects: Effects) -> None:
        super().__init__(table, policy, limits, effects)
        self._waiting: dict[str, OrderedDict[Waiter, None]] = {}
        self._wait_deadlines: list[tuple[float, int, Waiter]] = []
        self._stale = 0  # how many of them belong to waits that are over
        self._unserved: dict[str, float] = {}  # name -> when to try to serve its waiters again
        self._watchers: Subscriptions[Session] = Subscriptions()
        self._order = count()  # of waits that end at the same moment

    def _happened(self, events: Sequence[m.Event], now: float) -> None:
        """Tells the watchers, and then those who wait for a name."""
        if self._watchers.count:
            self._publish(events)
        for event in events:
            if event.event == "returned":
                self.counters["returned"] += 1
                self.effects.audit("take", event.name, None, "returned")
            if event.name in self._waiting and event.event in (
                "registered",
                "replaced",
                "returned",
            ):
                self._wake(event.name, now)

    # Another policy.

    def adopt(self, policy: Policy) -> None:
        """Decides by *policy* from now on. The waits and watches that it does not allow end."""
        self.policy = policy
        self.slots.changed_all()
        for waiter in [each for queue in self._waiting.values() for each in queue]:
            verb = "take" if type(waiter.request) is m.Take else "fetch"
            try:
                self._permit(verb, waiter.request.name, waiter.session)
            except AccessDenied as error:
                if not waiter.done:  # its client was found gone when another's end was told
                    self._give_up(waiter, error)
        for session in self._watchers.subscribers():
            try:
                self._permit("watch", "", session)
            except AccessDenied as error:
                self._end_watches(session, error)

    def refused(self, session: Session, request: m.AnyRequest | None, error: FdshareError) -> None:
        """Counts and notes a refusal; *request* is None for one that could not be decoded."""
        self.counters["refused"] += 1
        if self.effects.auditing:
            verb = "request" if request is None else type(request).__name__.lower()
            name = str(getattr(request, "name", "") or getattr(request, "old", ""))
            self.effects.audit_refusal(verb, name[:MAX_NAME], session, f"refused: {error}")

    # Waiting.

    def _wait_for(self, session: Session, id: int, request: Awaiting, now: float) -> None:
        """Keeps the request until its name appears."""
        wait = request.wait
        if wait is not None and not wait > 0:
            raise NameNotFound(request.name)
        self._check_waiting(session, id)
        waiter = Waiter(session, id, request, None if wait is None else now + wait)
        session.waiting[id] = waiter
        self._waiting.setdefault(request.name, OrderedDict())[waiter] = None
        if waiter.deadline is not None:
            heapq.heappush(self._wait_deadlines, (waiter.deadline, next(self._order), waiter))

    def _check_waiting(self, session: Session, id: int) -> None:
        """Refuses one wait or watch too many, and an id that is in use."""
        if id in session.waiting or id in session.watches:
            raise InvalidArgument("id", f"request {id} of this connection is still under way")
        used = len(session.waiting) + len(session.watches)
        self._quota("max_waiting", self.limits.max_waiting, used, 1)

    def _check_watches(self, user: User, pattern: str) -> None:
        """Refuses one watch too many: each costs something at every change."""
        if user.trusted:
            return
        limits = self.limits
        self._quota("max_watches_per_uid", limits.max_watches_per_uid, user.watches, 1)
        if has_wildcards(pattern) and pattern not in user.patterns:
            used = len(user.patterns)
            self._quota("max_patterns_per_uid", limits.max_patterns_per_uid, used, 1)

    def _keep_waiting(self, waiter: Waiter) -> None:
        """Puts *waiter*, which was stopped, back to the front of its queue, as a new one."""
        again = Waiter(waiter.session, waiter.id, waiter.request, waiter.deadline)
        again.session.waiting[again.id] = again
        queue = self._waiting.setdefault(again.request.name, OrderedDict())
        queue[again] = None
        queue.move_to_end(again, last=False)
        if again.deadline is not None:
            heapq.heappush(self._wait_deadlines, (again.deadline, next(self._order), again))

    def _wake(self, name: str, now: float) -> None:
        """Serves the first waiters of *name*, in their order, as long as the name is visible."""
        for _ in range(_AT_ONCE):
            queue, entry = self._waiting.get(name), self.table.visible(name)
            if queue is None or entry is None:
                return
            waiter = next(iter(queue))
            # Before the answer: if the client turns out to be gone, its other waits end in there.
            self._stop_waiting(waiter)
            try:
                request = waiter.request
                if self.effects.strict and not isinstance(request, m.Wait):
                    self._check_audit()
                if isinstance(request, m.Take):
                    self._lease(waiter.session, waiter.id, entry, now)
                elif isinstance(request, m.Wait):
                    there = m.Registered(entry.name, entry.generation)
                    self.effects.answer(waiter.session, waiter.id, m.encode(there))
                elif isinstance(request, m.Follow):
                    self._give_followed(waiter.session, waiter.id, request, entry)
                else:
                    self._give(waiter.session, waiter.id, entry, counts=not request.look)
            except JournalBusy:
                self._keep_waiting(waiter)
                self._unserved[name] = now + _AGAIN
                return
            except FdshareError as error:
                self._refuse(waiter, error)
        if name in self._waiting:
            self._unserved[name] = now  # the others have their turn, and then the rest of these

    def _end_waits(self, now: float) -> None:
        """Refuses the waits that are over, and serves those that could not be served before."""
        for _ in range(_AT_ONCE):
            if (deadline := self._next_wait()) is None or deadline > now:
                break
            waiter = self._wait_deadlines[0][2]
            self._give_up(waiter, FetchTimeout(waiter.request.name, waiter.request.wait or 0.0))
        for name in [name for name, again in self._unserved.items() if again <= now]:
            del self._unserved[name]
            self._wake(name, now)

    def _next_wait(self) -> float | None:
        """When the next wait is over."""
        while self._wait_deadlines and self._wait_deadlines[0][2].done:
            heapq.heappop(self._wait_deadlines)
            self._stale -= 1
        return self._wait_deadlines[0][0] if self._wait_deadlines else None

    def _give_up(self, waiter: Waiter, error: FdshareError) -> None:
        self._stop_waiting(waiter)
        self._refuse(waiter, error)

    def _refuse(self, waiter: Waiter, error: FdshareError) -> None:
        self.refused(waiter.session, waiter.request, error)
        self.effects.answer(waiter.session, waiter.id, m.encode(m.refusal(error)))

    def _stop_waiting(self, waiter: Waiter) -> None:
        waiter.done = True
        del waiter.session.waiting[waiter.id]
        queue = self._waiting[waiter.request.name]
        del queue[waiter]
        if not queue:
            del self._waiting[waiter.request.name]
        if waiter.deadline is None:
            return
        self._stale += 1  # its deadline, in the heap
        if self._stale > 64 + len(self._wait_deadlines) // 2:
            self._wait_deadlines = [item for item in self._wait_deadlines if not item[2].done]
            heapq.heapify(self._wait_deadlines)
            self._stale = 0

    # Watching.

    def _start_watching(self, session: Session, id: int, pattern: str) -> None:
        self._watchers.add(pattern, session)
        session.watches[id] = pattern
        session.user.watches += 1
        if has_wildcards(pattern):
            session.user.patterns[pattern] += 1

    def _stop_watching(self, session: Session, id: int) -> None:
        pattern, user = session.watches.pop(id), session.user
        self._watchers.remove(pattern, session)
        user.watches -= 1
        if has_wildcards(pattern):
            user.patterns[pattern] -= 1
            if not user.patterns[pattern]:
                del user.patterns[pattern]

    def _end_watches(self, session: Session, error: FdshareError) -> None:
        watches = dict(session.watches)
        for id in watches:
            self._stop_watching(session, id)
        for id, pattern in watches.items():
            self.refused(session, m.Watch(pattern), error)
            self.effects.answer(session, id, m.encode(m.refusal(error)))

    def snapshot(self, session: Session, id: int) -> None:
        """Sends what is visible now to the watch *id*; later events carry later serials."""
        matches = matcher(session.watches[id])
        found = [
            (e.name, e.generation)
            for e in self.table.entries.values()
            if e.lease is None and matches(e.name)
        ]
        serial, parts = self.table.serial, range(0, max(len(found), 1), PART)
        self.effects.answer_in_parts(
            session,
            id,
            [
                m.encode(m.SnapshotPart(serial, dict(found[i : i + PART]), i + PART < len(found)))
                for i in parts
            ],
        )

    def _publish(self, events: Sequence[m.Event]) -> None:
        for event in events:
            names = (event.name, event.old) if event.old else (event.name,)
            interested = self._watchers.of(*names)
            if interested:
                self.effects.publish(interested, m.encode(event))
