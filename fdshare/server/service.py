"""What the server does with a request: (session, request, now) -> calls on a `World`. No I/O.

Theory of operation. Every handler goes in one fixed order: shape, permission, leases of the name
settled, quota, clash; then it *plans* a `Record`; the world journals it; the registry applies it;
only then is the client answered, waiters woken and watchers told. A handler raises a FdshareError
to refuse, or `JournalBusy` to be called again with the same request later: nothing has changed
then. Whoever calls `handle` owns the request's handles again unless it returned True.

The registry is the truth; the world is told which handles to watch and which to close, and may be
wrong about both without harm: every call names an entry and its generation, a stale one is ignored.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Literal, Protocol, TypeAlias

from fdshare.errors import (
    AccessDenied,
    FdshareError,
    FetchTimeout,
    GenerationMismatch,
    InvalidArgument,
    NameNotFound,
    NameTaken,
    QuotaExceeded,
    TooManyDescriptors,
)
from fdshare.protocol import messages as m
from fdshare.protocol.names import (
    MAX_ENTRY_DESCRIPTORS,
    MAX_KIND,
    check_metadata,
    check_name,
    matcher,
)
from fdshare.protocol.patterns import Subscriptions
from fdshare.protocol.wire import MAX_FRAME_DESCRIPTORS
from fdshare.server.changes import (
    Change,
    Drop,
    Forget,
    Grant,
    Linger,
    Move,
    Put,
    Record,
    Settle,
)
from fdshare.server.limits import Limits
from fdshare.server.policy import Policy, Subject
from fdshare.server.registry import Applied, Entry, Handle, Registry

__all__ = ["JournalBusy", "LeaseState", "Service", "Session", "World"]

Awaiting: TypeAlias = m.Fetch | m.Take | m.Wait
LeaseState: TypeAlias = Literal["held", "confirmed", "dropped"]
_PART = 1000  # names or entries in one part of a long answer
_AGAIN = 0.01  # seconds until those who wait for a name are looked at again


class JournalBusy(Exception):
    """The keeper cannot take a record now; call again when it can. *wait*: how many seconds longer
    than usual that may take."""

    def __init__(self, reason: str = "it does not read its journal", wait: float = 0.0) -> None:
        super().__init__(reason)
        self.reason = reason
        self.wait = wait


@dataclass(slots=True, eq=False)
class Session:
    """One client connection, as the service knows it."""

    subject: Subject
    pid: int
    trusted: bool
    name: str = ""  # the client's connection id, from its Hello
    registrant: m.Registrant | None = None
    waiting: dict[int, Waiter] = field(default_factory=dict)
    watches: dict[int, str] = field(default_factory=dict)  # id -> pattern
    route: Any = None  # how the world finds the client


@dataclass(slots=True, eq=False)
class Waiter:
    """A request that waits for its name."""

    session: Session
    id: int
    request: Awaiting
    deadline: float | None
    done: bool = False


class World(Protocol):
    """What the service may ask for. Handles are the world's own; the service only moves them."""

    def answer(
        self, session: Session, id: int, body: bytes, handles: Sequence[Handle] = ()
    ) -> None:
        """Sends *body* and copies of *handles*; never fails, never blocks."""

    def answer_in_parts(self, session: Session, id: int, bodies: Sequence[bytes]) -> None:
        """Sends all of *bodies*, however long they are together; never fails, never blocks."""

    def publish(self, sessions: Sequence[Session], body: bytes) -> None:
        """Sends one event to many; a session that cannot take it is `resync`ed later."""

    def journal(self, record: Record, handles: Sequence[Handle]) -> None:
        """Returns once the keeper is bound to learn it. Raises: JournalBusy, KeeperUnavailable."""

    def lease_pair(self) -> tuple[Handle, Handle]:
        """A new lease: (our end, the taker's). Raises: DescriptorLimit."""

    def lease_state(self, ours: Handle, *, revoke: bool = False) -> LeaseState:
        """What the taker has done; with *revoke* it can do nothing more: never "held"."""

    def check_lifeline(self, handle: Handle) -> None:
        """Raises: InvalidArgument: it is no socket."""

    def owner_guard(self, session: Session) -> Handle:
        """A pidfd of the client's process. Raises: DescriptorLimit, InvalidArgument,
        UnsupportedPlatform."""

    def registrant(self, session: Session) -> m.Registrant: ...

    def watch(self, entry: Entry) -> None:
        """Tell `hung_up` and `lease_moved` when guard, descriptors or lease of *entry* stir.
        Never fails: the change is made, what cannot be watched is not."""

    def close(self, handles: Sequence[Handle]) -> None:
        """Never fails, never blocks."""

    def probe(self, session: Session, id: int, entries: Sequence[Entry], now: float) -> None:
        """Answers with an InfoList, when the kernel has been asked; may take a while."""

    def bind(self, address: str, backlog: int, reuse_port: bool) -> tuple[m.Kind, Handle]: ...

    def stats(self) -> m.ServerStats: ...

    def reload_policy(self) -> None: ...

    def command(self, verb: Literal["shutdown", "upgrade"], session: Session, id: int) -> bool:
        """Has it done; False where the answer comes later, from `upgraded` or a successor."""

    auditing: bool  # whether `audit` does anything

    def audit(self, verb: str, name: str, session: Session | None, outcome: str) -> None:
        """Notes who was given or refused what; *session* is None for what happened by itself."""


class Service:
    """The verbs, over one registry, one policy and one world."""

    def __init__(self, registry: Registry, policy: Policy, limits: Limits, world: World) -> None:
        self.registry = registry
        self.policy = policy
        self.limits = limits
        self.world = world
        self.counters = dict.fromkeys(
            ("requests", "refused", "registered", "fetched", "taken", "returned", "expired"), 0
        )
        self._waiting: dict[str, deque[Waiter]] = {}
        self._wait_deadlines: list[tuple[float, int, Waiter]] = []
        self._stale = 0  # how many of them are of waits that are over
        self._unserved: dict[str, float] = {}  # names whose waiters were not served: when to try
        self._watchers: Subscriptions[Session] = Subscriptions()
        self._absent: dict[str, float] = {}  # clients whose answers are kept, and until when
        self._here: dict[str, int] = {}  # client -> its connections
        self.leaving = False  # a successor comes: what is remembered is for it
        self._order = count()  # between waits that end at the same moment
        self._handlers: dict[type, Callable[..., bool]] = {
            m.Fetch: self._fetch,
            m.Take: self._take,
            m.Wait: self._wait,
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

    # The entry points: a request, an end, a stir, a tick.

    def handle(
        self, session: Session, id: int, request: m.AnyRequest, handles: list[Handle], now: float
    ) -> bool:
        """Answers *request*, now or later. True if *handles* now belong to the registry.

        Raises: FdshareError, to be sent as the refusal; JournalBusy, to be called again.
        """
        self.counters["requests"] += 1
        handler = self._handlers.get(type(request))
        if handler is None:
            raise InvalidArgument("request", f"{type(request).__name__} has no place here")
        if handles and type(request) is not m.Register:
            raise TooManyDescriptors(len(handles), 0)
        return handler(session, id, request, handles, now)

    def refused(self, session: Session, request: m.AnyRequest | None, error: FdshareError) -> None:
        """Somebody is told *error*; *request* is None for one that was not understood."""
        self.counters["refused"] += 1
        if self.world.auditing:
            verb = "request" if request is None else type(request).__name__.lower()
            name = str(getattr(request, "name", "") or getattr(request, "old", ""))
            self.world.audit(verb, name, session, f"refused: {error}")

    def disconnected(self, session: Session, now: float, *, unanswered: bool = False) -> None:
        """The client's connection has ended: nothing waits for it any more. *unanswered*: there
        are answers that it cannot have read, so it may come back and repeat the requests."""
        for waiter in list(session.waiting.values()):
            self._stop_waiting(waiter)
        for id in list(session.watches):
            self._stop_watching(session, id)
        if self._has_left(session.name) and not self.leaving:
            if unanswered:
                self._absent[session.name] = now + self.limits.session_timeout
                return
            try:
                self._commit(Record([Forget(session.name)]), [], now)
            except (JournalBusy, FdshareError):
                self._absent[session.name] = now + self.limits.session_timeout

    def _has_left(self, name: str) -> bool:
        """Counts one connection less of a client. True where answers for it are remembered and it
        has no other connection: it may have made a new one before the old one's end was seen."""
        count = self._here.pop(name, 0) - 1
        if count > 0:
            self._here[name] = count
        return count <= 0 and name in self.registry.answers

    def hung_up(self, entry: Entry, now: float, *, guard: bool) -> None:
        """The owner of *entry* is gone (*guard*), or the peer of a descriptor in it."""
        if self.registry.entries.get(entry.name) is not entry:
            return
        changes = self._settle(entry, revoke=not guard or not entry.grace)
        if self._is_taken(changes):
            self._commit(Record(changes), [], now)
            return
        if guard and entry.grace:
            until = now + entry.grace
            if entry.expires is not None:  # the grace does not prolong the time to live
                until = min(until, entry.expires)
            changes.append(Linger(entry.name, entry.generation, until))
        else:
            changes.append(Drop(entry.name, entry.generation, "hung_up"))
        self._commit(Record(changes), [], now)

    def lease_moved(self, lease: int, now: float) -> None:
        """The taker has confirmed or let go."""
        entry = self.registry.leases.get(lease)
        if entry is None:
            return
        changes = self._settle(entry)
        if changes:
            self._commit(Record(changes), [], now)

    def tick(self, now: float) -> None:
        """Everything that is due at *now*: expiries, leases held too long, waits that are over."""
        while (deadline := self._next_wait()) is not None and deadline <= now:
            waiter = self._wait_deadlines[0][2]
            self._give_up(waiter, FetchTimeout(waiter.request.name, waiter.request.wait or 0.0))
        for name in [name for name, again in self._unserved.items() if again <= now]:
            del self._unserved[name]
            self._wake(name, now)
        for entry in self.registry.expired(now):
            if self.registry.entries.get(entry.name) is not entry:
                continue  # it was due twice
            changes = self._settle(entry, revoke=True)
            if not self._is_taken(changes):
                changes = [Drop(entry.name, entry.generation, "expired")]
                self.counters["expired"] += 1
            self._commit(Record(changes), [], now)
        if self._absent:
            self._forget_absent(now)
        for entry in self._leases_too_old(now):
            if changes := self._settle(entry, revoke=True):
                self._commit(Record(changes), [], now)

    def next_deadline(self) -> float | None:
        """When to call `tick` next; None where nothing is due."""
        if not (self._wait_deadlines or self._unserved or self._absent or self.registry.timed):
            return None
        due = list(self._unserved.values())
        if (wait := self._next_wait()) is not None:
            due.append(wait)
        if (expiry := self.registry.next_deadline()) is not None:
            due.append(expiry)
        if self._absent:
            due.append(next(iter(self._absent.values())))
        if self.registry.leases:
            oldest = next(iter(self.registry.leases.values()))
            if oldest.lease is not None:
                due.append(oldest.lease.at + self.limits.lease_timeout)
        return min(due, default=None)

    def _next_wait(self) -> float | None:
        """When the next wait is over."""
        while self._wait_deadlines and self._wait_deadlines[0][2].done:
            heapq.heappop(self._wait_deadlines)
            self._stale -= 1
        return self._wait_deadlines[0][0] if self._wait_deadlines else None

    def expect(self, now: float) -> None:
        """After a server's death: the clients whose answers are remembered have until the session
        timeout to come back."""
        until = now + self.limits.session_timeout
        self._absent = dict.fromkeys(self.registry.answers, until)

    def greeted(self, session: Session) -> None:
        """The client of *session* is here, or here again."""
        self._absent.pop(session.name, None)
        if session.name:
            self._here[session.name] = self._here.get(session.name, 0) + 1

    def _forget_absent(self, now: float) -> None:
        for name in [name for name, until in self._absent.items() if until <= now]:
            self._commit(Record([Forget(name)]), [], now)
            del self._absent[name]

    # Reading verbs.

    def quick_fetch(self, session: Session, name: str) -> Entry | None:
        """The entry to give, where somebody whom no rule restrains fetches a visible name for at
        least the second time: nine requests of ten are that. None for all else; ask `handle`."""
        entry = self.registry.entries.get(name)
        if entry is None or not entry.reply or entry.lease is not None or not session.trusted:
            return None
        entry.fetches += 1
        self.counters["fetched"] += 1
        self.counters["requests"] += 1
        if self.world.auditing:
            self.world.audit("fetch", name, session, "given")
        return entry

    def _fetch(
        self, session: Session, id: int, request: m.Fetch, handles: list[Handle], now: float
    ) -> bool:
        if not session.trusted:
            self._permit("fetch", request.name, session)
        entry = self._present(request.name, now)
        if entry is None:
            self._wait_for(session, id, request, now)
        else:
            self._give(session, id, entry)
        return False

    def _fetch_many(
        self, session: Session, id: int, request: m.FetchMany, handles: list[Handle], now: float
    ) -> bool:
        entries = []
        missing = []
        for name in dict.fromkeys(request.names):
            self._permit("fetch", name, session)
            entry = self._present(name, now)
            if entry is None:
                missing.append(name)
            else:
                entries.append(entry)
        if missing:
            raise NameNotFound(missing)
        items: list[m.Item] = []
        given: list[Handle] = []
        room = min(MAX_FRAME_DESCRIPTORS, self.limits.in_flight_per_connection)
        for entry in entries:
            if given and len(given) + len(entry.handles) > room:
                break
            items.append(m.Item(entry.name, entry.generation, entry.kind, len(entry.handles)))
            given += entry.handles
            entry.fetches += 1
            self.world.audit("fetch", entry.name, session, "given")
        self.counters["fetched"] += len(items)
        self.world.answer(session, id, m.encode(m.GivenMany(items)), given)
        return False

    def _names(
        self, session: Session, id: int, request: m.Names, handles: list[Handle], now: float
    ) -> bool:
        self._permit("list", "", session)
        self._settle_all(now)
        matches = matcher(request.pattern)
        names = sorted(n for n, e in self.registry.entries.items() if not e.lease and matches(n))
        parts = range(0, max(len(names), 1), _PART)
        lists = [m.NameList(names[i : i + _PART], i + _PART < len(names)) for i in parts]
        self.world.answer_in_parts(session, id, list(map(m.encode, lists)))
        return False

    def _info(
        self, session: Session, id: int, request: m.Info, handles: list[Handle], now: float
    ) -> bool:
        self._permit("info", request.name, session)
        self._present(request.name, now)
        entry = self.registry.entries.get(request.name)
        if entry is None:
            raise NameNotFound(request.name)
        self.world.probe(session, id, [entry], now)
        return False

    def _infos(
        self, session: Session, id: int, request: m.Infos, handles: list[Handle], now: float
    ) -> bool:
        self._permit("list", "", session)
        self._settle_all(now)
        matches = matcher(request.pattern)
        found = sorted(n for n in self.registry.entries if matches(n))
        self.world.probe(session, id, [self.registry.entries[n] for n in found], now)
        return False

    def _explain(
        self, session: Session, id: int, request: m.Explain, handles: list[Handle], now: float
    ) -> bool:
        self._permit("explain", request.name, session)
        subject = Subject(request.uid, request.gid, tuple(request.groups))
        allowed, rule = self.policy.decide(request.verb, request.name, subject)
        entry = self.registry.entries.get(request.name)
        if allowed and entry and request.verb == "unregister":
            allowed, rule = self.policy.decide_removal(entry.registrant.uid, subject)
        self.world.answer(session, id, m.encode(m.Explained(allowed, rule)))
        return False

    def _stats(
        self, session: Session, id: int, request: m.Stats, handles: list[Handle], now: float
    ) -> bool:
        self._permit("stats", "", session)
        self._settle_all(now)
        self.world.answer(session, id, m.encode(m.StatsReply(self.world.stats())))
        return False

    def _ping(
        self, session: Session, id: int, request: m.Ping, handles: list[Handle], now: float
    ) -> bool:
        self.world.answer(session, id, _DONE)
        return False

    # Waiting.

    def _wait(
        self, session: Session, id: int, request: m.Wait, handles: list[Handle], now: float
    ) -> bool:
        self._permit("fetch", request.name, session)
        entry = self._present(request.name, now)
        if entry is None:
            self._wait_for(session, id, request, now)
        else:
            self.world.answer(session, id, m.encode(m.Registered(entry.name, entry.generation)))
        return False

    def _wait_for(self, session: Session, id: int, request: Awaiting, now: float) -> None:
        """Keeps the request until its name appears."""
        check_name(request.name)
        wait = request.wait
        if wait is not None and not wait > 0:
            raise NameNotFound(request.name)
        self._check_waiting(session, id)
        waiter = Waiter(session, id, request, None if wait is None else now + wait)
        session.waiting[id] = waiter
        self._waiting.setdefault(request.name, deque()).append(waiter)
        if waiter.deadline is not None:
            heapq.heappush(self._wait_deadlines, (waiter.deadline, next(self._order), waiter))

    def _check_waiting(self, session: Session, id: int) -> None:
        """Refuses one wait or watch too many, and an id that one goes by already."""
        if id in session.waiting or id in session.watches:
            raise InvalidArgument("id", f"request {id} of this connection is still under way")
        used = len(session.waiting) + len(session.watches)
        self._quota("max_waiting", self.limits.max_waiting, used, 1)

    def _keep_waiting(self, waiter: Waiter) -> None:
        """Puts one like *waiter*, which was stopped, to the front of its queue."""
        again = Waiter(waiter.session, waiter.id, waiter.request, waiter.deadline)
        again.session.waiting[again.id] = again
        self._waiting.setdefault(again.request.name, deque()).appendleft(again)
        if again.deadline is not None:
            heapq.heappush(self._wait_deadlines, (again.deadline, next(self._order), again))

    def _wake(self, name: str, now: float) -> None:
        """Serves those who wait for *name*, in their order, while it is there."""
        for waiter in list(self._waiting.get(name, ())):
            entry = self.registry.visible(name)
            if entry is None:
                return
            if waiter.done:  # answering one of them showed that this one's client is gone
                continue
            # Before it is answered: should the client turn out to be gone, its waits end here too.
            self._stop_waiting(waiter)
            try:
                if type(waiter.request) is m.Take:
                    self._lease(waiter.session, waiter.id, entry, now)
                elif type(waiter.request) is m.Wait:
                    there = m.Registered(entry.name, entry.generation)
                    self.world.answer(waiter.session, waiter.id, m.encode(there))
                else:
                    self._give(waiter.session, waiter.id, entry)
            except JournalBusy:
                self._keep_waiting(waiter)
                self._unserved[name] = now + _AGAIN
                return
            except FdshareError as error:
                self._refuse(waiter, error)

    def _give_up(self, waiter: Waiter, error: FdshareError) -> None:
        self._stop_waiting(waiter)
        self._refuse(waiter, error)

    def _refuse(self, waiter: Waiter, error: FdshareError) -> None:
        self.refused(waiter.session, waiter.request, error)
        self.world.answer(waiter.session, waiter.id, m.encode(m.refusal(error)))

    def _stop_waiting(self, waiter: Waiter) -> None:
        waiter.done = True
        del waiter.session.waiting[waiter.id]
        queue = self._waiting[waiter.request.name]
        queue.remove(waiter)
        if not queue:
            del self._waiting[waiter.request.name]
        if waiter.deadline is None:
            return
        self._stale += 1  # its deadline, in the heap
        if self._stale > 64 + len(self._wait_deadlines) // 2:
            self._wait_deadlines = [item for item in self._wait_deadlines if not item[2].done]
            heapq.heapify(self._wait_deadlines)
            self._stale = 0

    def _cancel(
        self, session: Session, id: int, request: m.Cancel, handles: list[Handle], now: float
    ) -> bool:
        waiter = session.waiting.get(request.target)
        if waiter is not None:
            self._give_up(waiter, FetchTimeout(waiter.request.name, 0.0))
        elif request.target in session.watches:
            self._stop_watching(session, request.target)
            self.world.answer(session, request.target, _DONE)
        return False

    # Watching.

    def _watch(
        self, session: Session, id: int, request: m.Watch, handles: list[Handle], now: float
    ) -> bool:
        self._permit("watch", "", session)
        self._check_waiting(session, id)
        self._settle_all(now)
        session.watches[id] = request.pattern
        self._watchers.add(request.pattern, session)
        self.snapshot(session, id)
        return False

    def _stop_watching(self, session: Session, id: int) -> None:
        self._watchers.remove(session.watches.pop(id), session)

    def snapshot(self, session: Session, id: int) -> None:
        """Sends what is visible now to the watch *id*; later events carry later serials."""
        matches = matcher(session.watches[id])
        found = [
            m.Entry(e.name, e.generation)
            for e in self.registry.entries.values()
            if e.lease is None and matches(e.name)
        ]
        serial, parts = self.registry.serial, range(0, max(len(found), 1), _PART)
        shots = [m.Snapshot(serial, found[i : i + _PART], i + _PART < len(found)) for i in parts]
        self.world.answer_in_parts(session, id, list(map(m.encode, shots)))

    def _publish(self, events: Sequence[m.Event]) -> None:
        for event in events:
            names = (event.name, event.old) if event.old else (event.name,)
            interested = self._watchers.of(*names)
            if interested:
                self.world.publish(interested, m.encode(event))

    # Verbs that change the table.

    def _register(
        self, session: Session, id: int, request: m.Register, handles: list[Handle], now: float
    ) -> bool:
        if self._answered_before(session, id):
            return False
        guarded = request.lifetime != "server"
        own = len(handles) - (request.lifetime == "connection")
        self._check_registration(request, own)
        self._permit("register", request.name, session)
        former = self.registry.entries.get(request.name)
        changes = self._settle(former) if former else []
        if self._is_taken(changes):
            former = None
        self._check_clash(request, former, session)
        if request.lifetime == "connection":
            self.world.check_lifeline(handles[-1])
        self._check_quota(session, len(handles) + (request.lifetime == "process"), former)
        if former is not None and former.lease is not None and not changes:
            changes = self._settle(former, revoke=True)
        generation = self.registry.generation + 1
        put = Put(
            name=request.name,
            generation=generation,
            kind=request.kind,
            count=own,
            registrant=self._registrant(session),
            at=now,
            lifetime=request.lifetime,
            guarded=guarded,
            expires=None if request.ttl is None else now + request.ttl,
            grace=request.grace,
            drop_on_hangup=request.drop_on_hangup,
            metadata=request.metadata,
        )
        reply = m.encode(m.Registered(request.name, generation))
        extra = [self.world.owner_guard(session)] if request.lifetime == "process" else []
        record = Record([*changes, put], session.name, id, reply)
        try:
            self._commit(record, handles + extra, now, lambda: self._told(session, id, reply))
        except BaseException:
            self.world.close(extra)
            raise
        self.counters["registered"] += 1
        self.world.audit("register", request.name, session, f"generation {generation}")
        return True

    def _told(self, session: Session, id: int, reply: bytes) -> None:
        self.world.answer(session, id, reply)

    def _answered_before(self, session: Session, id: int) -> bool:
        """True where the request is a repeat: its client has its first answer now."""
        # Clients without a session repeat nothing, and must not get each other's answers.
        known = self.registry.answer(session.name, id) if session.name else None
        if known is None:
            return False
        self.world.answer(session, id, known)
        return True

    def _check_registration(self, request: m.Register, count: int) -> None:
        check_name(request.name)
        check_metadata(request.metadata)
        size = len(request.kind.tag.encode()) + memoryview(request.kind.spec).nbytes
        if size > MAX_KIND:
            raise InvalidArgument("kind", f"{size} bytes, at most {MAX_KIND} of tag and spec")
        if count < 1:
            raise InvalidArgument("descriptors", "an entry has at least one")
        if count > MAX_ENTRY_DESCRIPTORS:
            raise TooManyDescriptors(count, MAX_ENTRY_DESCRIPTORS)
        if request.ttl is not None and not 0 < request.ttl < float("inf"):
            raise InvalidArgument("ttl", f"{request.ttl!r} is no positive number of seconds")
        if not 0 <= request.grace < float("inf"):
            raise InvalidArgument("grace", f"{request.grace!r} is no number of seconds")

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

    def _check_quota(self, session: Session, count: int, former: Entry | None) -> None:
        """Refuses what would go beyond a limit, with what the replaced entry frees counted in."""
        limits, registry = self.limits, self.registry
        freed = len(former.all_handles()) if former else 0
        names = len(registry) - (former is not None)
        self._quota("max_names", limits.max_names, names, 1)
        used = registry.descriptors - freed
        self._quota("max_descriptors", limits.max_descriptors, used, count)
        if session.trusted:
            return
        usage = registry.usage(session.subject.uid)
        mine = former is not None and former.registrant.uid == session.subject.uid
        self._quota("max_names_per_uid", limits.max_names_per_uid, usage.names - mine, 1)
        # Of the replaced one all but the lease: that counts for nobody.
        freed -= former is not None and former.lease is not None
        used = usage.descriptors - (freed if mine else 0)
        self._quota("max_descriptors_per_uid", limits.max_descriptors_per_uid, used, count)

    @staticmethod
    def _quota(what: str, limit: int, used: int, more: int) -> None:
        if used + more > limit:
            raise QuotaExceeded(what, limit, used)

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

    def _lease(self, session: Session, id: int, entry: Entry, now: float) -> None:
        """Answers with the entry and the taker's end of a lease on it."""
        ours, theirs = self.world.lease_pair()
        lease = self.registry.last_lease + 1
        try:
            self._commit(Record([Grant(entry.name, lease, now)]), [ours], now)
        except BaseException:
            self.world.close([ours, theirs])
            raise
        given = m.Given(entry.name, entry.generation, entry.kind, entry.metadata, lease=True)
        entry.fetches += 1
        self.counters["taken"] += 1
        self.world.audit("take", entry.name, session, f"leased {lease}")
        self.world.answer(session, id, m.encode(given), [*entry.handles, theirs])
        # The world keeps what it still has to send; the taker's end must not stay open here.
        self.world.close([theirs])

    def _unregister(
        self, session: Session, id: int, request: m.Unregister, handles: list[Handle], now: float
    ) -> bool:
        if self._answered_before(session, id):
            return False
        self._permit("unregister", request.name, session)
        entry = self.registry.entries.get(request.name)
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
        record = Record(changes, session.name, id, _DONE)
        self._commit(record, [], now, lambda: self._told(session, id, _DONE))
        self.world.audit("unregister", request.name, session, "removed")
        return False

    def _rename(
        self, session: Session, id: int, request: m.Rename, handles: list[Handle], now: float
    ) -> bool:
        if self._answered_before(session, id):
            return False
        check_name(request.new)
        self._permit("unregister", request.old, session)
        self._permit("register", request.new, session)
        entry = self._present(request.old, now)
        if entry is None:
            raise NameNotFound(request.old)
        self._permit_removal("unregister", entry, session)
        self._present(request.new, now)
        clash = self.registry.entries.get(request.new)
        if clash is not None:
            raise NameTaken(request.new, clash.generation)
        generation = self.registry.generation + 1
        reply = m.encode(m.Registered(request.new, generation))
        record = Record([Move(request.old, request.new, generation)], session.name, id, reply)
        self._commit(record, [], now, lambda: self._told(session, id, reply))
        self.world.audit("rename", request.old, session, f"to {request.new}")
        return False

    def _bind(
        self, session: Session, id: int, request: m.Bind, handles: list[Handle], now: float
    ) -> bool:
        check_name(request.name)
        self._permit("fetch", request.name, session)
        entry = self._present(request.name, now)
        if entry is None:
            entry = self._bind_new(session, request, now)
        self._give(session, id, entry)
        return False

    def _bind_new(self, session: Session, request: m.Bind, now: float) -> Entry:
        self._permit("bind", request.address, session)
        self._permit("register", request.name, session)
        clash = self.registry.entries.get(request.name)
        if clash is not None:  # leased: somebody is taking it
            raise NameTaken(request.name, clash.generation)
        self._check_quota(session, 1, None)
        kind, handle = self.world.bind(request.address, request.backlog, request.reuse_port)
        generation = self.registry.generation + 1
        put = Put(request.name, generation, kind, 1, self._registrant(session), now)
        try:
            self._commit(Record([put]), [handle], now)
        except BaseException:
            self.world.close([handle])
            raise
        self.world.audit("bind", request.name, session, request.address)
        return self.registry.entries[request.name]

    # Verbs for the server itself.

    def _reload(
        self, session: Session, id: int, request: m.Reload, handles: list[Handle], now: float
    ) -> bool:
        self._permit("reload", "", session)
        self.world.reload_policy()
        self.world.answer(session, id, _DONE)
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
        if self._answered_before(session, id):  # we are the successor that was asked for
            return False
        if self.world.command(verb, session, id):
            self.world.answer(session, id, _DONE)
        return False

    # The steps that the verbs share.

    def _commit(
        self,
        record: Record,
        handles: Sequence[Handle],
        now: float,
        answer: Callable[[], None] | None = None,
    ) -> None:
        """Journals *record*, applies it, answers, and tells whom it concerns."""
        self.world.journal(record, handles)
        applied = self.registry.apply(record, list(handles))
        if answer is not None:
            answer()
        self._spread(applied, now)

    def _spread(self, applied: Applied, now: float) -> None:
        for entry in applied.changed:
            self.world.watch(entry)
        if applied.closed:
            self.world.close(applied.closed)
        if self._watchers:
            self._publish(applied.events)
        if self._waiting:
            for event in applied.events:
                if event.event in ("registered", "replaced", "returned"):
                    self._wake(event.name, now)
        for event in applied.events:
            if event.event == "returned":
                self.counters["returned"] += 1
                self.world.audit("take", event.name, None, "returned")

    def _present(self, name: str, now: float) -> Entry | None:
        """The entry that is visible under *name* once its lease, if one is pending, is settled."""
        entry = self.registry.entries.get(name)
        if entry is None or entry.lease is None:
            return entry
        changes = self._settle(entry)
        if changes:
            self._commit(Record(changes), [], now)
        return self.registry.visible(name)

    def _settle_all(self, now: float) -> None:
        for entry in list(self.registry.leases.values()):
            if changes := self._settle(entry):
                self._commit(Record(changes), [], now)

    def _settle(self, entry: Entry, *, revoke: bool = False) -> list[Change]:
        """What the taker of *entry* did, as changes; none where it is not leased, or still is."""
        if entry.lease is None:
            return []
        state = self.world.lease_state(entry.lease.handle, revoke=revoke)
        if state == "held":
            return []
        return [Settle(entry.lease.id, "taken" if state == "confirmed" else "returned")]

    @staticmethod
    def _is_taken(changes: Sequence[Change]) -> bool:
        return any(isinstance(change, Settle) and change.outcome == "taken" for change in changes)

    def _leases_too_old(self, now: float) -> list[Entry]:
        if not self.registry.leases:
            return []
        before = now - self.limits.lease_timeout
        entries = self.registry.leases.values()
        return [e for e in entries if e.lease is not None and e.lease.at <= before]

    def _give(self, session: Session, id: int, entry: Entry) -> None:
        """Answers a fetch. The reply's body is the same for all, so it is encoded once."""
        if not entry.reply:
            given = m.Given(entry.name, entry.generation, entry.kind, entry.metadata)
            entry.reply = m.encode(given)
        entry.fetches += 1
        self.counters["fetched"] += 1
        self.world.answer(session, id, entry.reply, entry.handles)
        self.world.audit("fetch", entry.name, session, "given")

    def _registrant(self, session: Session) -> m.Registrant:
        if session.registrant is None:
            session.registrant = self.world.registrant(session)
        return session.registrant

    def _permit(self, verb: str, name: str, session: Session) -> None:
        if session.trusted:
            return
        allowed, rule = self.policy.decide(verb, name, session.subject)
        if not allowed:
            raise AccessDenied(verb, name, session.subject.uid, rule)

    def _permit_removal(self, verb: str, entry: Entry, session: Session) -> None:
        if session.trusted:
            return
        allowed, rule = self.policy.decide_removal(entry.registrant.uid, session.subject)
        if not allowed:
            raise AccessDenied(verb, entry.name, session.subject.uid, rule)


_DONE = m.encode(m.Done())
