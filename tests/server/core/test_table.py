"""The table under the service, against a model: a dictionary and a few rules.

The state machine plays clients, takers, clocks and a moody keeper. After every step: the table is
the model's, every handle is open exactly as long as the table refers to it, the accounts are what
is there, each request has one answer, and the keeper's table, fed with the same records, and one
made of an image are the same.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import hypothesis.strategies as st
import msgspec
from hypothesis import settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from fdshare.errors import FdshareError
from fdshare.protocol import messages as m
from fdshare.server.core.image import Image, image_of, table_of
from fdshare.server.core.ports import JournalBusy
from fdshare.server.core.table import Table
from fdshare.server.limits import Limits
from server.memory_effects import MemoryEffects

KIND = m.Kind("descriptor", msgspec.Raw(b"\xc0"))
LIMITS = msgspec.structs.replace(
    Limits.for_rlimit(1000),
    max_names=3,
    max_descriptors=9,
    max_names_per_uid=3,
    max_descriptors_per_uid=8,
    lease_timeout=7,
)
NAMES = ["a", "b", "c", "d"]
# A name, or the place of one among those that are held: the second is what most rules are about.
names = st.sampled_from(NAMES) | st.integers(0, 5) | st.integers(0, 5)
clients = st.integers(0, 2)


@dataclass(frozen=True)
class Held:
    """What the model knows of an entry."""

    generation: int
    handles: tuple[int, ...]
    uid: int
    lifetime: str
    guarded: bool
    expires: float | None
    grace: float
    lease: int | None = None  # the taker's end
    leased_at: float = 0.0


def contents(table: Table) -> dict[str, Any]:
    """Everything that two equal tables agree about."""
    return {
        "entries": {
            name: (
                entry.generation,
                entry.put.kind.tag,
                entry.handles,
                entry.guard,
                entry.put.registrant,
                entry.put.at,
                entry.put.lifetime,
                entry.expires,
                entry.put.grace,
                entry.put.metadata,
                entry.lease and (entry.lease.id, entry.lease.handle, entry.lease.at),
            )
            for name, entry in table.entries.items()
        },
        "leases": {id: entry.name for id, entry in table.leases.items()},
        "answers": {name: dict(kept) for name, kept in table.answers.items()},
        "counters": (table.generation, table.serial, table.last_lease),
        "descriptors": table.descriptors,
        "usage": {uid: (u.names, u.descriptors) for uid, u in table._usage.items()},
        "next": table.next_deadline(),
    }


class Rendezvous(RuleBasedStateMachine):
    @initialize()
    def start(self) -> None:
        self.effects = MemoryEffects(own_uid=1, limits=LIMITS)
        self.service, self.table = self.effects.service, self.effects.table
        self.now = 0.0
        self.model: dict[str, Held] = {}
        # uid 1 is the server's own, uid 2 may what the policy says: nothing; so all are trusted.
        self.sessions = [self.effects.session(1, f"client-{n}") for n in range(3)]
        self.watcher = self.effects.session(1, "watcher")
        self.service.handle(self.watcher, 1, m.Watch(), [], 0.0)
        (_, snapshot, _), *_ = self.watcher.route.take()
        self.serial = snapshot.serial
        self.seen: dict[str, int] = {}
        self.last_id = 0
        self.waits: dict[int, tuple[int, Any, float | None]] = {}  # id -> client, request, deadline
        self.last: dict[int, tuple[int, Any, Any]] = {}  # client -> id, request, its answer
        self.leases: dict[int, str] = {}  # the taker's end -> name

    # How a request is made.

    def ask(self, client: int, request: Any, handles: list[int], id: int = 0) -> Any:
        """The reply, the exception, or None where it waits."""
        if not id:
            self.last_id += 1
            id = self.last_id
        session = self.sessions[client]
        kept = False
        try:
            kept = self.service.handle(session, id, request, handles, self.now)
            outcome: Any = None
        except (FdshareError, JournalBusy) as error:
            outcome = error
        if not kept:
            self.effects.close(handles)
        mine = [sent for sent in session.route.sent if sent[0] == id]
        session.route.sent = [sent for sent in session.route.sent if sent[0] != id]
        if mine:
            assert outcome is None
            assert len(mine) == 1
            outcome = mine[0][1:]
        elif outcome is None:
            assert isinstance(request, m.Fetch | m.Take | m.Wait)
        self.asked = id
        return outcome

    def code(self, outcome: Any) -> str:
        """ "done", "waits", or the code of the refusal."""
        if outcome is None:
            return "waits"
        if isinstance(outcome, FdshareError):
            return outcome.code
        if isinstance(outcome, JournalBusy):
            return "busy"
        return "done"

    # What the model knows.

    def name(self, drawn: str | int) -> str:
        """The name that was drawn."""
        if isinstance(drawn, str):
            return drawn
        return sorted(self.model)[drawn % len(self.model)] if self.model else NAMES[0]

    def leased(self) -> list[int]:
        """The takers' ends."""
        return [held.lease for held in self.model.values() if held.lease is not None]

    def settle(self, name: str, revoke: bool = False) -> None:
        """What the service does before any other operation on a leased name."""
        held = self.model.get(name)
        if held is None or held.lease is None:
            return
        state = self.effects.leases[self.effects.lease_of[held.lease]]
        if state == "confirmed":
            del self.model[name]
        elif state == "dropped" or revoke:
            self.model[name] = replace(held, lease=None)

    def journal(self, expected: str) -> str:
        """What becomes of a change that would be made."""
        if expected != "done":
            return expected
        return (
            "keeper_unavailable" if self.effects.broken else "busy" if self.effects.busy else "done"
        )

    def moody(self) -> bool:
        return self.effects.broken or self.effects.busy

    def pending(self, name: str) -> bool:
        """True where a lease of *name* has ended and the service has not been told."""
        held = self.model.get(name)
        return (
            held is not None
            and held.lease is not None
            and self.effects.leases[self.effects.lease_of[held.lease]] != "held"
        )

    # The rules.

    @rule(
        client=clients,
        name=names,
        count=st.integers(1, 4),
        replace=st.booleans(),
        if_generation=st.sampled_from([None, None, None, None, "current", 0, 1]),
        lifetime=st.sampled_from(["server", "server", "connection", "process"]),
        ttl=st.none() | st.integers(1, 5),
        grace=st.integers(0, 4),
    )
    def register(
        self,
        client: int,
        name: str | int,
        count: int,
        replace: bool,
        if_generation: int | str | None,
        lifetime: str,
        ttl: int | None,
        grace: int,
    ) -> None:
        name = self.name(name)
        former = self.model.get(name)
        if if_generation == "current":
            if_generation = former.generation if former else 0
        request = m.Register(
            name, KIND, replace, if_generation, lifetime, ttl, float(grace), False, {"k": name}
        )
        crowded = self.settle_if_crowded(count + (lifetime != "server"))
        former = self.model.get(name)
        pending, moody = self.pending(name), self.moody()
        handles = self.effects.new_handles(count + (lifetime == "connection"))
        outcome = self.ask(client, request, list(handles))
        if crowded and moody:
            assert self.code(outcome) in ("busy", "keeper_unavailable")
            return
        visible = former
        if (
            pending
            and former is not None
            and self.effects.leases[self.effects.lease_of[former.lease or 0]] == "confirmed"
        ):
            visible = None
        current = visible.generation if visible else 0
        guarded = lifetime != "server"
        if if_generation is not None and if_generation != current:
            expected = "generation_mismatch"
        elif visible is not None and if_generation is None and not replace:
            expected = "name_taken"
        elif self.quota_says_no(count + guarded, visible, former):
            expected = "quota_exceeded"
        elif lifetime == "process" and self.effects.full:
            expected = "descriptor_limit"
        else:
            expected = self.journal("done")
        assert self.code(outcome) == expected, (outcome, expected, moody)
        if expected != "done":
            return
        reply, none = outcome
        assert none == ()
        generation = reply.generation
        assert generation > max([h.generation for h in self.model.values()], default=0)
        guard = lifetime != "server"
        self.model[name] = Held(
            generation,
            tuple(handles[:count]),
            1,
            lifetime,
            guard,
            None if ttl is None else self.now + ttl,
            float(grace),
        )
        self.last[client] = (self.asked, request, reply)

    def settle_if_crowded(self, count: int) -> bool:
        """Where there is little room, leases that have ended are settled first. True where one
        was, or would be but for the keeper."""
        held = list(self.model.values())
        total = sum(len(h.handles) + h.guarded + (h.lease is not None) for h in held)
        ended = [name for name in self.model if self.pending(name)]
        if len(held) < LIMITS.max_names and total + count <= LIMITS.max_descriptors:
            return False
        if not self.moody():
            for name in ended:
                self.settle(name)
        return bool(ended)

    def quota_says_no(self, count: int, visible: Held | None, former: Held | None) -> bool:
        """A confirmed lease that is still in the table counts until the record is applied."""
        held = list(self.model.values())
        total = sum(len(h.handles) + h.guarded + (h.lease is not None) for h in held)
        freed = 0
        if visible is not None:
            freed = len(visible.handles) + visible.guarded + (visible.lease is not None)
        return (
            len(held) - (visible is not None) + 1 > LIMITS.max_names
            or total - freed + count > LIMITS.max_descriptors
        )

    @precondition(lambda self: self.last)
    @rule(client=clients)
    def repeat(self, client: int) -> None:
        """The last change that was answered, again: the same answer, and no change."""
        if client not in self.last:
            return
        id, request, reply = self.last[client]
        handles = self.effects.new_handles(2 if isinstance(request, m.Register) else 0)
        outcome = self.ask(client, request, handles, id)
        assert outcome == (reply, ())

    @rule(
        client=clients,
        verb=st.sampled_from([m.Fetch, m.Take, m.Take, m.Wait]),
        name=names,
        wait=st.sampled_from([0.0, 0.0, 0.0, 3.0, None]),
    )
    def want(self, client: int, verb: Any, name: str | int, wait: float | None) -> None:
        name = self.name(name)
        pending, moody = self.pending(name), self.moody()
        outcome = self.ask(client, verb(name, wait), [])
        if pending and moody:
            assert self.code(outcome) in ("busy", "keeper_unavailable")
            return
        self.settle(name)
        held = self.model.get(name)
        if held is None or held.lease is not None:
            if wait == 0.0:
                assert self.code(outcome) == "name_not_found"
            else:
                assert self.code(outcome) == "waits"
                deadline = None if wait is None else self.now + wait
                self.waits[self.asked] = (client, verb(name, wait), deadline)
            return
        if verb is m.Take and (self.effects.full or moody):
            expected = "descriptor_limit" if self.effects.full else self.journal("done")
            assert self.code(outcome) == expected
            return
        self.given(verb, name, held, outcome)

    def given(self, verb: Any, name: str, held: Held, outcome: Any) -> None:
        """Checks what a fetch, take or wait was answered, and leases in the model."""
        reply, handles = outcome
        assert (reply.name, reply.generation) == (name, held.generation)
        if verb is m.Wait:
            assert type(reply) is m.Registered
            assert handles == ()
        elif verb is m.Fetch:
            assert not reply.lease
            assert handles == held.handles
        else:
            assert reply.lease
            *entry, taker = handles
            assert tuple(entry) == held.handles
            self.model[name] = replace(held, lease=taker, leased_at=self.now)
            self.leases[taker] = name

    @precondition(lambda self: self.leased())
    @rule(data=st.data(), word=st.sampled_from(["confirmed", "dropped"]), told=st.booleans())
    def end_lease(self, data: st.DataObject, word: Any, told: bool) -> None:
        """A taker confirms or lets go; the service hears of it now, or by the next look."""
        taker = data.draw(st.sampled_from(self.leased()))
        (name,) = [n for n, h in self.model.items() if h.lease == taker]
        revoked = self.effects.lease_of[taker] in self.effects.revoked  # by what was not journaled
        assert self.effects.say(taker, word) != revoked
        if told and not self.moody():
            entry = self.table.entries[name]
            assert entry.lease is not None
            self.settle(name)
            self.service.lease_moved(entry.lease.id, self.now)

    @precondition(lambda self: self.model)
    @rule(client=clients, name=names, if_generation=st.sampled_from([None, None, "current", 1]))
    def unregister(self, client: int, name: str | int, if_generation: int | str | None) -> None:
        name = self.name(name)
        held = self.model.get(name)
        if if_generation == "current":
            if_generation = held.generation if held else 0
        request = m.Unregister(name, if_generation)
        outcome = self.ask(client, request, [])
        gone = held is None or (
            self.pending(name)
            and self.effects.leases[self.effects.lease_of[held.lease or 0]] == "confirmed"
        )
        if gone or held is None:
            assert self.code(outcome) == "name_not_found"
            return
        if if_generation is not None and if_generation != held.generation:
            assert self.code(outcome) == "generation_mismatch"
            return
        expected = self.journal("done")
        assert self.code(outcome) == expected
        if expected == "done":
            del self.model[name]
            self.last[client] = (self.asked, request, outcome[0])

    @precondition(lambda self: self.model)
    @rule(client=clients, old=names, new=names)
    def rename(self, client: int, old: str | int, new: str | int) -> None:
        old, new = self.name(old), self.name(new)
        blocked = self.moody() and (self.pending(old) or self.pending(new))
        request = m.Rename(old, new)
        outcome = self.ask(client, request, [])
        if blocked and self.code(outcome) in ("busy", "keeper_unavailable"):
            return
        self.settle(old)
        held = self.model.get(old)
        if held is None or held.lease is not None:
            assert self.code(outcome) == "name_not_found"
            return
        self.settle(new)
        if new in self.model:
            assert self.code(outcome) == "name_taken"
            return
        expected = self.journal("done")
        assert self.code(outcome) == expected
        if expected == "done":
            del self.model[old]
            self.model[new] = replace(held, generation=outcome[0].generation)
            self.last[client] = (self.asked, request, outcome[0])

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def owner_dies(self, data: st.DataObject) -> None:
        guarded = sorted(n for n, h in self.model.items() if h.guarded)
        if not guarded or self.moody():
            return
        name = data.draw(st.sampled_from(guarded))
        entry, held = self.table.entries[name], self.model[name]
        self.service.hung_up(entry, self.now, guard=True)
        self.settle(name, revoke=not held.grace)
        if name not in self.model:
            return
        if held.grace:
            until = self.now + held.grace
            if held.expires is not None:
                until = min(until, held.expires)
            self.model[name] = replace(self.model[name], guarded=False, expires=until)
        else:
            del self.model[name]

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def peer_hangs_up(self, data: st.DataObject) -> None:
        if self.moody():
            return
        name = data.draw(st.sampled_from(sorted(self.model)))
        self.service.hung_up(self.table.entries[name], self.now, guard=False)
        del self.model[name]

    @rule(client=clients)
    def reconnect(self, client: int) -> None:
        """The connection ends and another one is made: what waits is forgotten, and so are the
        answers, unless the keeper could not be told."""
        session = self.sessions[client]
        session.route.closed = True
        name = session.name
        remembered = dict(self.table.answers.get(name, {}))
        moody = self.moody()
        self.service.disconnected(session, self.now)
        if moody and remembered:
            assert self.table.answers[name] == remembered
        else:
            assert name not in self.table.answers
            self.last.pop(client, None)
        self.waits = {i: w for i, w in self.waits.items() if w[0] != client}
        self.sessions[client] = self.effects.session(1, name)

    @precondition(lambda self: self.waits)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        id = data.draw(st.sampled_from(sorted(self.waits)))
        client, _, _ = self.waits.pop(id)
        self.last_id += 1
        self.service.handle(self.sessions[client], self.last_id, m.Cancel(id), [], self.now)
        (got, reply, _) = self.sessions[client].route.sent.pop()
        assert (got, reply.code) == (id, "fetch_timeout")

    @rule(seconds=st.sampled_from([0, 1, 1, 2, 5]))
    def time_passes(self, seconds: int) -> None:
        self.now += seconds
        if self.moody():
            return
        self.service.tick(self.now)
        for id, (client, request, deadline) in list(self.waits.items()):
            if deadline is not None and deadline <= self.now:
                route = self.sessions[client].route
                (sent,) = [sent for sent in route.sent if sent[0] == id]
                if type(sent[1]) is m.Refused and sent[1].code == "fetch_timeout":
                    route.sent.remove(sent)
                    assert sent[1].fields == {"name": request.name, "timeout": request.wait}
                    del self.waits[id]
        for name, held in list(self.model.items()):
            if held.expires is not None and held.expires <= self.now:
                self.model.pop(name)
        for name, held in list(self.model.items()):
            if held.lease is not None and held.leased_at + LIMITS.lease_timeout <= self.now:
                self.settle(name, revoke=True)

    @rule(mood=st.sampled_from(["busy", "broken", "full", *["well"] * 6]))
    def change_mood(self, mood: str) -> None:
        self.effects.busy = self.effects.broken = self.effects.full = False
        if mood != "well":
            setattr(self.effects, mood, True)

    # What is always true.

    @invariant()
    def everything_holds(self) -> None:
        self.waiters_are_served()  # the first, for the model learns from it who was
        self.the_table_is_the_model()
        self.every_handle_is_open_while_it_is_held()
        self.the_accounts_are_right()
        self.the_keeper_has_the_same()
        self.an_image_makes_the_same_table()
        self.a_watcher_can_follow()
        self.time_is_asked_for()

    def waiters_are_served(self) -> None:
        """Whoever waits for a name that is there has been answered, in the order of asking."""
        for id, (client, request, _) in sorted(self.waits.items()):
            route = self.sessions[client].route
            for sent in [sent for sent in route.sent if sent[0] == id]:
                route.sent.remove(sent)
                del self.waits[id]
                reply, handles = sent[1:]
                if type(reply) is m.Refused:
                    assert reply.code in ("keeper_unavailable", "descriptor_limit")
                    continue
                # It may have been taken by one who waited, and given back, since.
                held = self.model.get(request.name)
                if held is not None and held.generation == reply.generation:
                    if held.lease is not None and type(request) is m.Take:
                        continue
                    self.given(type(request), request.name, held, (reply, handles))
        for id, (_, request, deadline) in self.waits.items():
            held = self.model.get(request.name)
            if held is not None and held.lease is None and not self.moody():
                assert self.service._unserved, (id, request, deadline)
        assert all(not session.route.sent for session in self.sessions)

    def the_table_is_the_model(self) -> None:
        entries = self.table.entries
        assert set(entries) == set(self.model)
        for name, held in self.model.items():
            entry = entries[name]
            assert entry.generation == held.generation
            assert entry.handles == held.handles
            assert (entry.guard is not None) == held.guarded
            assert entry.expires == held.expires
            assert (entry.lease is not None) == (held.lease is not None)
            assert (self.table.visible(name) is None) == (held.lease is not None)

    def every_handle_is_open_while_it_is_held(self) -> None:
        held = list(self.table.handles())
        assert len(set(held)) == len(held)
        assert set(held) == self.effects.open

    def the_accounts_are_right(self) -> None:
        held = self.model.values()
        leases = sum(h.lease is not None for h in held)
        own = sum(len(h.handles) + h.guarded for h in held)
        assert self.table.descriptors == own + leases
        assert len(self.table.leases) == leases
        usage = self.table.usage(1)
        # All is uid 1's: the entries, and the leases of what it takes.
        assert (usage.names, usage.descriptors) == (len(self.model), own + leases)

    def the_keeper_has_the_same(self) -> None:
        assert contents(self.effects.keeper) == contents(self.table)

    def an_image_makes_the_same_table(self) -> None:
        image, handles = image_of(self.table)
        other = table_of(msgspec.msgpack.decode(msgspec.msgpack.encode(image), type=Image), handles)
        assert contents(other) == contents(self.table)
        fetches = {name: entry.fetches for name, entry in self.table.entries.items()}
        assert {name: entry.fetches for name, entry in other.entries.items()} == fetches

    def a_watcher_can_follow(self) -> None:
        for id, event, _ in self.watcher.route.take():
            assert id == 0
            self.serial += 1
            assert event.serial == self.serial
            if event.old:
                del self.seen[event.old]
            if event.event in ("registered", "replaced", "returned"):
                assert (event.event == "replaced") == (event.name in self.seen)
                self.seen[event.name] = event.generation
            else:
                self.seen.pop(event.name, None)
        visible = {n: h.generation for n, h in self.model.items() if h.lease is None}
        assert self.seen == visible
        assert self.serial == self.table.serial

    def time_is_asked_for(self) -> None:
        """The loop is told when to look again, never for something that is nobody's."""
        due = self.service.next_deadline()
        for held in self.model.values():
            if held.expires is not None:
                assert due is not None
                assert due <= held.expires
            if held.lease is not None:
                assert due is not None
                assert due <= held.leased_at + LIMITS.lease_timeout


TestRendezvous = Rendezvous.TestCase
TestRendezvous.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
