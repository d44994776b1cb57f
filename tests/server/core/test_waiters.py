"""waiters: requests that wait for a name, in their order, whatever the keeper and others do."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from fdshare.errors import (
    InvalidArgument,
    QuotaExceeded,
)
from fdshare.protocol import messages as m
from fdshare.server.core.policy import Decision, Policy, Subject
from fdshare.server.core.ports import JournalBusy, Session
from server.memory_effects import Everybody, MemoryEffects, register


def test_a_busy_keeper_does_not_lose_a_waiter(effects: MemoryEffects) -> None:
    """The change that wakes it is journaled, the lease that it wants is not, at first."""
    waiting = effects.session()
    effects.service.handle(waiting, 1, m.Take("x", wait=None), [], 0.0)
    journal = effects.journal

    def moody(record: Any, handles: Any) -> None:
        journal(record, handles)
        effects.busy = True

    effects.journal = moody  # type: ignore[method-assign]
    register(effects, effects.session())
    effects.journal = journal  # type: ignore[method-assign]
    assert not waiting.route.sent
    due = effects.service.next_deadline()
    assert due is not None
    effects.service.tick(due)
    assert not waiting.route.sent
    effects.busy = False
    due = effects.service.next_deadline()
    assert due is not None
    effects.service.tick(due)
    ((id, reply, handles),) = waiting.route.sent
    assert (id, reply.lease, len(handles)) == (1, True, 2)
    assert not waiting.waiting


def test_the_order_of_waiters_survives_a_busy_keeper(effects: MemoryEffects) -> None:
    sessions = [effects.session() for _ in range(3)]
    for session in sessions:
        effects.service.handle(session, 1, m.Take("x", wait=5.0), [], 0.0)
    register(effects, effects.session())
    (_, _, (_, taker)) = sessions[0].route.sent.pop()
    effects.busy = True
    effects.say(taker, "dropped")
    lease = next(iter(effects.table.leases))
    with pytest.raises(JournalBusy):
        effects.service.lease_moved(lease, 1.0)
    effects.busy = False
    effects.service.lease_moved(lease, 1.0)
    assert [len(session.route.sent) for session in sessions] == [0, 1, 0]
    effects.service.tick(5.0)
    assert [session.route.sent[-1][1].__class__ for session in sessions[1:]] == [m.Given, m.Refused]


def test_a_client_that_is_found_gone_while_it_is_served(effects: MemoryEffects) -> None:
    """Answering the first of its waits shows it: the others end too, those behind are served."""
    gone, alive = effects.session(), effects.session()
    for id in (1, 2):
        effects.service.handle(gone, id, m.Fetch("x", wait=60.0), [], 0.0)
    effects.service.handle(alive, 3, m.Fetch("x", wait=60.0), [], 0.0)
    answer = effects.answer

    def answering(session: Session, id: int, body: bytes, handles: Any = ()) -> None:
        if session is gone and not gone.route.closed:
            gone.route.closed = True
            effects.service.disconnected(gone, 0.0)
        answer(session, id, body, handles)

    effects.answer = answering  # type: ignore[method-assign]
    register(effects, effects.session())
    assert not gone.waiting
    assert [type(sent[1]) for sent in alive.route.sent] == [m.Given]
    assert not effects.service._waiting


def test_no_descriptor_for_a_lease_refuses_the_waiter_alone(effects: MemoryEffects) -> None:
    waiting = effects.session()
    effects.service.handle(waiting, 1, m.Take("x", wait=None), [], 0.0)
    effects.full = True
    register(effects, effects.session())
    assert waiting.route.sent[0][1].code == "descriptor_limit"
    assert len(effects.open) == 1


def test_waits_that_are_over_leave_nothing_behind(effects: MemoryEffects) -> None:
    session = effects.session()
    for id in range(1, 2000):
        effects.service.handle(session, id, m.Fetch("x", wait=1e6), [], 0.0)
        effects.service.handle(session, 5000, m.Cancel(id), [], 0.0)
    assert len(effects.service._wait_deadlines) < 200
    assert effects.service.next_deadline() in (None, 1e6)
    assert not session.waiting


def test_a_watch_that_is_refused_leaves_nothing_behind(effects: MemoryEffects) -> None:
    session = effects.session()
    with pytest.raises(InvalidArgument):
        effects.service.handle(session, 1, m.Watch("*" * 2000), [], 0.0)
    assert session.watches == {}
    effects.service.disconnected(session, 0.0)


def test_many_waits_are_served_in_several_turns(effects: MemoryEffects) -> None:
    """In their order, and nobody is forgotten."""
    sessions = [effects.session() for _ in range(200)]
    for session in sessions:
        effects.service.handle(session, 1, m.Wait("x", None), [], 0.0)
    register(effects, effects.session())
    answered = [bool(session.route.take()) for session in sessions]
    assert answered == [True] * 64 + [False] * 136
    assert effects.service.next_deadline() == 0.0
    for _ in range(3):
        effects.service.tick(0.0)
    assert all(session.route.take() for session in sessions[64:])
    effects.service.tick(0.0)
    assert effects.service.next_deadline() is None


def test_many_waits_are_over_in_several_turns(effects: MemoryEffects) -> None:
    sessions = [effects.session() for _ in range(100)]
    for session in sessions:
        effects.service.handle(session, 1, m.Wait("x", 5.0), [], 0.0)
    effects.service.tick(5.0)
    assert [bool(session.waiting) for session in sessions] == [False] * 64 + [True] * 36
    assert effects.service.next_deadline() == 5.0
    effects.service.tick(5.0)
    assert not any(session.waiting for session in sessions)


def test_watches_count_against_the_user(effects: MemoryEffects) -> None:
    limits = msgspec.structs.replace(effects.service.limits, max_watches_per_uid=3)
    effects.service.limits = limits
    effects.service.adopt(Everybody(1))
    first, second = effects.session(1501), effects.session(1501)
    second.user = first.user
    for id in (1, 2):
        effects.service.handle(first, id, m.Watch(), [], 0.0)
    effects.service.handle(second, 1, m.Watch(), [], 0.0)
    with pytest.raises(QuotaExceeded, match="max_watches_per_uid"):
        effects.service.handle(second, 2, m.Watch(), [], 0.0)
    effects.service.handle(first, 3, m.Cancel(1), [], 0.0)
    effects.service.handle(second, 2, m.Watch(), [], 0.0)
    effects.service.disconnected(first, 0.0)
    effects.service.disconnected(second, 0.0)
    assert first.user.watches == 0


def test_patterns_count_against_the_user(effects: MemoryEffects) -> None:
    """Each is tried at every change, however many watch it."""
    limits = msgspec.structs.replace(effects.service.limits, max_patterns_per_uid=2)
    effects.service.limits = limits
    effects.service.adopt(Everybody(1))
    session = effects.session(1501)
    for id, pattern in enumerate(("a*", "b*", "a*", "plain", "name"), 1):
        effects.service.handle(session, id, m.Watch(pattern), [], 0.0)
    with pytest.raises(QuotaExceeded, match="max_patterns_per_uid"):
        effects.service.handle(session, 6, m.Watch("c*"), [], 0.0)
    effects.service.handle(session, 7, m.Cancel(1), [], 0.0)
    with pytest.raises(QuotaExceeded, match="max_patterns_per_uid"):
        effects.service.handle(session, 6, m.Watch("c*"), [], 0.0)
    effects.service.handle(session, 7, m.Cancel(3), [], 0.0)
    effects.service.handle(session, 6, m.Watch("c*"), [], 0.0)
    other = effects.session(1502)
    effects.service.handle(other, 1, m.Watch("d*"), [], 0.0)
    effects.service.disconnected(session, 0.0)
    assert not session.user.patterns


def test_ids_under_way_are_taken(effects: MemoryEffects) -> None:
    session = effects.session()
    effects.service.handle(session, 1, m.Fetch("x", wait=1.0), [], 0.0)
    effects.service.handle(session, 2, m.Watch("*"), [], 0.0)
    for id in (1, 2):
        for request in (m.Fetch("x", wait=1.0), m.Watch("*")):
            with pytest.raises(InvalidArgument):
                effects.service.handle(session, id, request, [], 0.0)


class OnlyVerb(Policy):
    """Allows uid 2 the fetch of any name."""

    def decide(self, verb: str, name: str, subject: Subject) -> Decision:
        return Decision(self.trusts(subject) or (verb == "fetch" and subject.uid == 2), "a test")


def test_another_policy_ends_what_it_does_not_allow(effects: MemoryEffects) -> None:
    effects.service.policy = Everybody(1)
    loses, keeps, owner = effects.session(3), effects.session(2), effects.session()
    for session in (loses, keeps, owner):
        for id, request in enumerate((m.Fetch("x", None), m.Wait("x", 9.0), m.Take("x", None)), 1):
            effects.service.handle(session, id, request, [], 0.0)
        effects.service.handle(session, 4, m.Watch("*"), [], 0.0)
        effects.service.handle(session, 5, m.Watch("x"), [], 0.0)
        session.route.take()
    effects.service.adopt(OnlyVerb(1))
    for session, ended in ((loses, [1, 2, 3, 4, 5]), (keeps, [3, 4, 5]), (owner, [])):
        said = session.route.take()
        assert sorted(id for id, _, _ in said) == ended
        assert {reply.code for _, reply, _ in said} <= {"access_denied"}
    register(effects, owner)
    assert loses.route.take() == []
    assert [id for id, _, _ in keeps.route.take()] == [1, 2]
    assert sorted(id for id, _, _ in owner.route.take()) == [0, 0, 1, 2, 3]
    assert effects.service.counters["refused"] == 8
    effects.service.disconnected(loses, 0.0)


def test_a_client_that_is_found_gone_when_its_waits_are_ended(effects: MemoryEffects) -> None:
    effects.service.policy = Everybody(1)
    gone = effects.session(3)
    for id in (1, 2):
        effects.service.handle(gone, id, m.Fetch("x", wait=60.0), [], 0.0)
        effects.service.handle(gone, 2 + id, m.Watch("*"), [], 0.0)
    gone.route.take()
    answer = effects.answer

    def answering(session: Session, id: int, body: bytes, handles: Any = ()) -> None:
        answer(session, id, body, handles)
        if not gone.route.closed:
            gone.route.closed = True
            effects.service.disconnected(gone, 0.0)

    effects.answer = answering  # type: ignore[method-assign]
    effects.service.adopt(OnlyVerb(1))
    assert [id for id, _, _ in gone.route.take()] == [1]
    assert not gone.waiting
    assert not gone.watches
    assert not effects.service._watchers.count


def test_a_waiter_that_the_audit_log_has_no_room_for(effects: MemoryEffects) -> None:
    session = effects.session()
    for id, request in enumerate((m.Take("x", None), m.Fetch("x", None), m.Wait("x", None))):
        effects.service.handle(session, id, request, [], 0.0)
    effects.strict = True
    journal = effects.journal

    def fills(record: Any, handles: Any) -> None:
        journal(record, handles)
        effects.audit_full = True

    effects.journal = fills  # type: ignore[method-assign]
    register(effects, effects.session())
    replies = {id: reply for id, reply, _ in session.route.sent}
    assert [replies[id].code for id in (0, 1)] == ["log_full"] * 2
    assert type(replies[2]) is m.Registered
    assert effects.table.entries["x"].lease is None
