"""The service where the model of test_table.py does not reach: what is due, who left, commands."""

from __future__ import annotations

import pytest

from fdshare.errors import (
    InvalidArgument,
    LogFull,
    PolicyError,
    TooManyDescriptors,
)
from fdshare.protocol import messages as m
from fdshare.server.core.records import Record
from server.memory_effects import KIND, MemoryEffects, register


def test_equal_deadlines_and_a_removal(effects: MemoryEffects) -> None:
    session = effects.session()
    for name in "abcd":
        register(effects, session, name, ttl=5.0)
    register(effects, session, "e", ttl=5.0, lifetime="process", grace=5.0)
    effects.service.hung_up(effects.table.entries["e"], 0.0, guard=True)  # its grace ends at 5, too
    effects.service.handle(session, 1, m.Unregister("b"), [], 1.0)
    effects.service.tick(4.999)
    assert sorted(effects.table.entries) == ["a", "c", "d", "e"]
    effects.service.tick(5.0)
    assert not effects.table.entries
    assert not effects.open
    assert effects.service.next_deadline() is None


def test_grace_does_not_prolong_a_time_to_live(effects: MemoryEffects) -> None:
    session = effects.session()
    register(effects, session, "a", ttl=5.0, lifetime="process", grace=100.0)
    effects.service.hung_up(effects.table.entries["a"], 1.0, guard=True)
    effects.service.tick(5.0)
    assert not effects.table.entries


def test_many_replacements_leave_no_deadlines_behind(effects: MemoryEffects) -> None:
    session = effects.session()
    for _ in range(1000):
        register(effects, session, replace=True, ttl=1000.0)
    assert len(effects.table.deadlines) < 100


def test_descriptors_come_with_register_alone(effects: MemoryEffects) -> None:
    handles = effects.new_handles(1)
    with pytest.raises(TooManyDescriptors):
        effects.service.handle(effects.session(), 1, m.Ping(), handles, 0.0)
    with pytest.raises(InvalidArgument):
        effects.service.handle(effects.session(), 1, m.Hello("fdshare", 1, ""), [], 0.0)


# What is due next.


def test_the_next_deadline_is_the_earliest_of_all_kinds(effects: MemoryEffects) -> None:
    """A loop that sleeps longer is late, one that is told of what is over never sleeps."""
    service, limits = effects.service, effects.service.limits
    session = effects.session(name="me")
    assert service.next_deadline() is None
    register(effects, session, "leased")
    service.handle(session, 1, m.Take("leased"), [], 100.0)
    assert service.next_deadline() == 100.0 + limits.lease_timeout
    service.handle(session, 2, m.Fetch("late", 40.0), [], 100.0)
    assert service.next_deadline() == 140.0
    register(effects, session, "brief", ttl=30.0, now=100.0)
    assert service.next_deadline() == 130.0
    other = effects.session(name="other")
    register(effects, other, "y")
    service.disconnected(other, -250.0, unanswered=True)
    assert service.next_deadline() == -250.0 + limits.session_timeout == 50.0
    service.tick(50.0)
    assert service.next_deadline() == 130.0
    service.tick(130.0)
    assert service.next_deadline() == 140.0
    service.tick(140.0)
    assert service.next_deadline() == 160.0
    service.tick(160.0)
    assert service.next_deadline() is None
    assert sorted(effects.table.entries) == ["leased", "y"]
    assert not effects.table.leases


def test_a_lease_that_lasts_too_long_is_revoked(effects: MemoryEffects) -> None:
    session = effects.session()
    register(effects, session)
    effects.service.handle(session, 1, m.Take("x"), [], 0.0)
    ((_, _, (_, taker)),) = session.route.take()
    timeout = effects.service.limits.lease_timeout
    effects.service.tick(timeout - 0.001)
    assert effects.table.visible("x") is None
    effects.service.tick(timeout)
    assert effects.table.visible("x") is not None
    assert not effects.say(taker, "confirmed")


# Answers that are kept for those who may repeat.


def test_answers_are_forgotten_when_the_last_connection_ends(effects: MemoryEffects) -> None:
    first, second = effects.session(name="me"), effects.session(name="me")
    register(effects, first)
    effects.service.disconnected(first, 0.0)
    assert "me" in effects.table.answers  # it has reconnected before that was seen
    effects.service.disconnected(second, 0.0)
    assert effects.table.answers == effects.keeper.answers == {}


def test_who_may_not_have_read_its_answer_has_time_to_come_back(effects: MemoryEffects) -> None:
    timeout = effects.service.limits.session_timeout
    for comes_back in (True, False):
        session = effects.session(name="me")
        register(effects, session, replace=True)
        effects.service.disconnected(session, 100.0, unanswered=True)
        if comes_back:
            back = effects.session(name="me")
            effects.service.tick(1000.0)
            assert "me" in effects.table.answers
            effects.service.disconnected(back, 1000.0)
            continue
        effects.service.tick(100.0 + timeout - 0.001)
        assert "me" in effects.table.answers
        effects.service.tick(100.0 + timeout)
    assert effects.table.answers == effects.keeper.answers == {}


def test_the_clients_of_a_dead_server_have_time_to_come_back(effects: MemoryEffects) -> None:
    for name in ("back", "gone"):
        register(effects, effects.session(name=name), name)
    successor = MemoryEffects()
    for table in (successor.table, successor.keeper):
        table.answers = {name: kept.copy() for name, kept in effects.table.answers.items()}
    successor.service.expect(100.0)
    successor.session(name="back")
    timeout = successor.service.limits.session_timeout
    assert successor.service.next_deadline() == 100.0 + timeout
    successor.service.tick(100.0 + timeout)
    assert list(successor.table.answers) == list(successor.keeper.answers) == ["back"]
    assert successor.service.next_deadline() is None


def test_a_server_that_leaves_forgets_nothing(effects: MemoryEffects) -> None:
    """What is remembered is for its successor."""
    session = effects.session(name="me")
    register(effects, session)
    effects.service.leaving = True
    effects.service.disconnected(session, 0.0)
    assert "me" in effects.table.answers


def test_what_a_busy_keeper_does_not_forget_now_it_does_later(effects: MemoryEffects) -> None:
    session = effects.session(name="me")
    register(effects, session)
    effects.busy = True
    effects.service.disconnected(session, 0.0)
    assert "me" in effects.table.answers
    effects.busy = False
    effects.service.tick(effects.service.limits.session_timeout)
    assert effects.table.answers == effects.keeper.answers == {}


# Ends.


def test_the_end_of_a_connection_ends_its_waits_and_watches(effects: MemoryEffects) -> None:
    session = effects.session()
    effects.service.handle(session, 1, m.Fetch("x", 60.0), [], 0.0)
    effects.service.handle(session, 2, m.Watch("*"), [], 0.0)
    session.route.take()
    effects.service.disconnected(session, 0.0)
    register(effects, effects.session())
    assert session.route.sent == []
    assert effects.service.next_deadline() is None


@pytest.mark.parametrize("guard", [True, False])
def test_a_hang_up_that_is_reported_too_late_is_nothing(
    effects: MemoryEffects, guard: bool
) -> None:
    session = effects.session()
    register(effects, session, lifetime="process")
    former = effects.table.entries["x"]
    register(effects, session, replace=True)
    effects.service.hung_up(former, 0.0, guard=guard)
    effects.service.lease_moved(99, 0.0)
    assert list(effects.table.entries) == ["x"]


def test_an_entry_without_grace_goes_with_its_owner(effects: MemoryEffects) -> None:
    session, watcher = effects.session(), effects.session()
    register(effects, session, lifetime="process")
    effects.service.handle(watcher, 1, m.Watch("*"), [], 0.0)
    effects.service.hung_up(effects.table.entries["x"], 0.0, guard=True)
    assert not effects.open
    assert watcher.route.take()[-1][1].event == "hung_up"


@pytest.mark.parametrize("confirmed", [True, False])
def test_the_owner_of_a_leased_entry_goes(effects: MemoryEffects, confirmed: bool) -> None:
    """With a grace the taker has that time; without, what it has not confirmed is gone."""
    for grace in (0.0, 5.0):
        session = effects.session()
        register(effects, session, lifetime="process", grace=grace)
        effects.service.handle(session, 1, m.Take("x"), [], 0.0)
        ((_, _, (_, taker)),) = session.route.take()
        if confirmed:
            assert effects.say(taker, "confirmed")
        effects.service.hung_up(effects.table.entries["x"], 1.0, guard=True)
        held = "x" in effects.table.entries
        assert held == (grace > 0 and not confirmed)
        if held:
            assert effects.say(taker, "confirmed")
            effects.service.tick(6.0)
        assert not effects.table.entries
        assert not effects.open


# Verbs for the server itself.


def test_a_command_is_answered_once_it_is_carried_out(effects: MemoryEffects) -> None:
    session = effects.session(name="me")
    asked = []
    effects.command = lambda verb, session, id: asked.append((verb, id)) or verb == "shutdown"  # type: ignore[method-assign]
    for id, request in ((1, m.Shutdown()), (2, m.Upgrade())):
        effects.service.handle(session, id, request, [], 0.0)
    assert asked == [("shutdown", 1), ("upgrade", 2)]
    assert [(id, reply) for id, reply, _ in session.route.take()] == [(1, m.Done())]
    effects.table.apply(Record([], "me", 2, m.encode(m.Done())), [])  # by the new code
    effects.service.handle(session, 2, m.Upgrade(), [], 0.0)
    assert [(id, reply) for id, reply, _ in session.route.take()] == [(2, m.Done())]
    assert len(asked) == 2


def test_a_reload_that_fails_is_not_answered_as_done(effects: MemoryEffects) -> None:
    session = effects.session()
    effects.service.handle(session, 1, m.Reload(), [], 0.0)
    assert session.route.take()[0][1] == m.Done()

    def fail() -> None:
        raise PolicyError("policy", "rule 1", "it is none")

    effects.reload_policy = fail  # type: ignore[method-assign]
    with pytest.raises(PolicyError):
        effects.service.handle(session, 1, m.Reload(), [], 0.0)
    assert session.route.take() == []


# A log that must have every line.


def test_nothing_is_done_that_the_audit_log_has_no_room_for(effects: MemoryEffects) -> None:
    session = effects.session()
    register(effects, session, "a")
    effects.audit_full = True
    register(effects, session, "b")  # for those who need not have every line
    effects.strict = True
    handles = effects.new_handles(1)
    for request in (
        m.Register("c", KIND),
        m.Fetch("a"),
        m.Take("a"),
        m.FetchMany(["a"]),
        m.Unregister("a"),
        m.Rename("a", "c"),
        m.Bind("c", "tcp://127.0.0.1:0"),
    ):
        sent = handles if type(request) is m.Register else []
        with pytest.raises(LogFull):
            effects.service.handle(session, 1, request, sent, 0.0)
    for id, harmless in enumerate((m.Ping(), m.Names("*"), m.Wait("a")), start=2):
        effects.service.handle(session, id, harmless, [], 0.0)
    assert sorted(effects.table.entries) == ["a", "b"]
    effects.audit_full = False
    effects.service.handle(session, 9, m.Fetch("a"), [], 0.0)
