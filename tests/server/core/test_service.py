"""The service where the model of test_registry.py does not reach: others, busy keepers, memory."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from fdshare.errors import (
    AccessDenied,
    InvalidArgument,
    KeeperUnavailable,
    NameNotFound,
    QuotaExceeded,
    TooManyDescriptors,
)
from fdshare.protocol import messages as m
from fdshare.server.core.policy import Decision, Policy, Subject
from fdshare.server.core.ports import JournalBusy, Session
from fdshare.server.core.table import ANSWERS_KEPT
from fdshare.server.limits import Limits
from server.memory_effects import MemoryEffects

KIND = m.Kind("descriptor", msgspec.Raw(b"\xc0"))


class Everybody(Policy):
    """Lets everybody do everything, but for the registrant rule."""

    def decide(self, verb: str, name: str, subject: Subject) -> Decision:
        return Decision(True, "all")


@pytest.fixture
def effects() -> MemoryEffects:
    return MemoryEffects()


def register(
    effects: MemoryEffects, session: Session, name: str = "x", count: int = 1, **fields: Any
) -> Any:
    """The reply. Raises the refusal; the handles are closed then."""
    handles = effects.new_handles(count)
    register.id += 1  # type: ignore[attr-defined]
    id = fields.pop("id", register.id)  # type: ignore[attr-defined]
    now = fields.pop("now", 0.0)
    try:
        kept = effects.service.handle(session, id, m.Register(name, KIND, **fields), handles, now)
    except BaseException:
        effects.close(handles)
        raise
    if not kept:
        effects.close(handles)
    return session.route.sent.pop(0)[1]


register.id = 1000  # type: ignore[attr-defined]


def test_others_may_nothing(effects: MemoryEffects) -> None:
    register(effects, effects.session())
    stranger = effects.session(uid=2)
    for request in (
        m.Fetch("x"),
        m.Take("x"),
        m.Wait("x"),
        m.FetchMany(["x"]),
        m.Unregister("x"),
        m.Rename("x", "y"),
        m.Bind("x", "tcp://127.0.0.1:0"),
        m.Names(),
        m.Info("x"),
        m.Infos(),
        m.Watch(),
        m.Explain("fetch", "x", 0, 0),
        m.Stats(),
        m.Shutdown(),
        m.Upgrade(),
        m.Reload(),
    ):
        with pytest.raises(AccessDenied) as caught:
            effects.service.handle(stranger, 1, request, [], 0.0)
        assert caught.value.uid == 2
        assert caught.value.rule
    with pytest.raises(AccessDenied):
        register(effects, stranger, "y")
    assert list(effects.table.entries) == ["x"]


def test_root_may_what_the_owner_may(effects: MemoryEffects) -> None:
    register(effects, effects.session(uid=0))
    effects.service.handle(effects.session(uid=1), 1, m.Unregister("x"), [], 0.0)


def test_only_the_registrant_replaces_and_removes(effects: MemoryEffects) -> None:
    effects.service.policy = Everybody(1)
    mine, theirs, root = effects.session(2), effects.session(3), effects.session(0)
    register(effects, mine)
    for attempt in (
        lambda: register(effects, theirs, replace=True),
        lambda: effects.service.handle(theirs, 1, m.Unregister("x"), [], 0.0),
        lambda: effects.service.handle(theirs, 1, m.Rename("x", "y"), [], 0.0),
    ):
        with pytest.raises(AccessDenied) as caught:
            attempt()
        assert caught.value.name == "x"
    register(effects, mine, replace=True)
    register(effects, root, replace=True)
    with pytest.raises(AccessDenied):
        register(effects, mine, replace=True)


def test_quotas_of_a_user_bind_no_other() -> None:
    limits = msgspec.structs.replace(
        Limits.for_rlimit(1000), max_names_per_uid=2, max_descriptors_per_uid=5
    )
    effects = MemoryEffects(limits=limits)
    effects.service.policy = Everybody(1)
    two, three, owner = effects.session(2), effects.session(3), effects.session(1)
    register(effects, two, "a", count=3)
    with pytest.raises(QuotaExceeded) as caught:
        register(effects, two, "b", count=3)
    assert caught.value.fields == {"what": "max_descriptors_per_uid", "limit": 5, "used": 3}
    register(effects, two, "b", count=2)
    with pytest.raises(QuotaExceeded) as caught:
        register(effects, two, "c")
    assert caught.value.fields == {"what": "max_names_per_uid", "limit": 2, "used": 2}
    register(effects, two, "a", count=3, replace=True)
    register(effects, three, "c", count=5)
    for name in "defg":
        register(effects, owner, name, count=5)
    effects.service.handle(two, 1, m.Unregister("a"), [], 0.0)
    register(effects, two, "again", count=3)


def test_a_lease_on_my_entry_does_not_make_room_for_more() -> None:
    limits = msgspec.structs.replace(Limits.for_rlimit(1000), max_descriptors_per_uid=3)
    effects = MemoryEffects(limits=limits)
    effects.service.policy = Everybody(1)
    mine = effects.session(2)
    register(effects, mine, "a", count=3)
    effects.service.handle(effects.session(1), 1, m.Take("a"), [], 0.0)
    with pytest.raises(QuotaExceeded):
        register(effects, mine, "a", count=4, replace=True)


# Repeats


def test_a_repeat_is_answered_from_memory(effects: MemoryEffects) -> None:
    session = effects.session(name="me")
    first = register(effects, session, id=7)
    assert register(effects, session, id=7) == first
    assert effects.table.generation == 1
    assert len(effects.open) == 1


def test_clients_without_a_session_share_no_memory(effects: MemoryEffects) -> None:
    register(effects, effects.session(), "a", id=7)
    assert register(effects, effects.session(), "b", id=7).name == "b"
    assert sorted(effects.table.entries) == ["a", "b"]


def test_so_many_answers_are_kept(effects: MemoryEffects) -> None:
    session = effects.session(name="me")
    for id in range(1, ANSWERS_KEPT + 2):
        register(effects, session, replace=True, id=id)
    generation = effects.table.generation
    register(effects, session, replace=True, id=2)
    assert effects.table.generation == generation
    register(effects, session, replace=True, id=1)
    assert effects.table.generation == generation + 1


def test_refusals_are_not_remembered(effects: MemoryEffects) -> None:
    session = effects.session(name="me")
    with pytest.raises(NameNotFound):
        effects.service.handle(session, 1, m.Unregister("x"), [], 0.0)
    register(effects, session)
    effects.service.handle(session, 1, m.Unregister("x"), [], 0.0)
    assert not effects.table.entries


# A keeper that cannot keep up


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


def test_a_broken_keeper_refuses_changes_and_nothing_else(effects: MemoryEffects) -> None:
    session = effects.session()
    register(effects, session)
    effects.broken = True
    with pytest.raises(KeeperUnavailable):
        register(effects, session, "y")
    with pytest.raises(KeeperUnavailable):
        effects.service.handle(session, 1, m.Take("x"), [], 0.0)
    effects.service.handle(session, 2, m.Fetch("x"), [], 0.0)
    effects.service.handle(session, 3, m.Names(), [], 0.0)
    assert [type(sent[1]) for sent in session.route.sent] == [m.Given, m.NameList]
    assert len(effects.open) == 1


# Waiting


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


def test_ids_under_way_are_taken(effects: MemoryEffects) -> None:
    session = effects.session()
    effects.service.handle(session, 1, m.Fetch("x", wait=1.0), [], 0.0)
    effects.service.handle(session, 2, m.Watch("*"), [], 0.0)
    for id in (1, 2):
        for request in (m.Fetch("x", wait=1.0), m.Watch("*")):
            with pytest.raises(InvalidArgument):
                effects.service.handle(session, id, request, [], 0.0)


# Time


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


def test_an_expired_lease_that_was_confirmed_is_the_takers(effects: MemoryEffects) -> None:
    session = effects.session()
    register(effects, session, ttl=5.0)
    effects.service.handle(session, 1, m.Take("x"), [], 0.0)
    ((_, _, (_, taker)),) = session.route.take()
    assert effects.say(taker, "confirmed")
    effects.service.tick(5.0)
    assert effects.service.counters["expired"] == 0
    assert not effects.table.entries


# Shape


def test_descriptors_come_with_register_alone(effects: MemoryEffects) -> None:
    handles = effects.new_handles(1)
    with pytest.raises(TooManyDescriptors):
        effects.service.handle(effects.session(), 1, m.Ping(), handles, 0.0)
    with pytest.raises(InvalidArgument):
        effects.service.handle(effects.session(), 1, m.Hello("fdshare", 1, ""), [], 0.0)


def test_fetch_many_gives_what_fits(effects: MemoryEffects) -> None:
    session = effects.session()
    for name, count in (("a", 200), ("b", 50), ("c", 4), ("d", 250)):
        register(effects, session, name, count=count)
    asked = ["a", "b", "c", "d", "a"]
    answers = []
    while asked:
        effects.service.handle(session, 1, m.FetchMany(asked), [], 0.0)
        ((_, reply, handles),) = session.route.take()
        assert sum(item.count for item in reply.items) == len(handles) <= 253
        answers.append([item.name for item in reply.items])
        asked = [name for name in asked if name not in answers[-1]]
    assert answers == [["a", "b"], ["c"], ["d"]]


def test_a_renamed_entry_answers_by_its_new_name(effects: MemoryEffects) -> None:
    session = effects.session()
    register(effects, session, "old")
    effects.service.handle(session, 1, m.Fetch("old"), [], 0.0)  # its answer is encoded, and kept
    effects.service.handle(session, 2, m.Rename("old", "new"), [], 0.0)
    effects.service.handle(session, 3, m.Fetch("new"), [], 0.0)
    _, (_, renamed, _), (_, given, _) = session.route.take()
    assert (given.name, given.generation) == ("new", renamed.generation)


def test_what_a_watcher_sees_of_a_leased_name_that_is_replaced(effects: MemoryEffects) -> None:
    """The lease is revoked first: nobody sees a name replaced that he has seen taken."""
    session, watcher = effects.session(), effects.session()
    effects.service.handle(watcher, 1, m.Watch("*"), [], 0.0)
    register(effects, session)
    effects.service.handle(session, 1, m.Take("x"), [], 0.0)
    register(effects, session, replace=True)
    events = [sent[1].event for sent in watcher.route.take()[1:]]
    assert events == ["registered", "taken", "returned", "replaced"]
