"""transactions: permission, room and leases."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from fdshare.errors import (
    AccessDenied,
    KeeperUnavailable,
    QuotaExceeded,
)
from fdshare.protocol import messages as m
from fdshare.server.limits import Limits
from server.memory_effects import Everybody, MemoryEffects, register


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


def test_an_answer_is_owed_until_what_was_removed_is_closed(effects: MemoryEffects) -> None:
    session = effects.session()
    register(effects, session)
    assert session.owed == 0
    waiting: list[Callable[[], None] | None] = []
    effects.close_removed = lambda handles, ends, then: waiting.append(then)  # type: ignore[method-assign]
    effects.service.handle(session, 1, m.Unregister("x"), [], 0.0)
    assert (session.owed, session.route.take()) == (1, [])
    (answer,) = waiting
    assert answer is not None
    answer()
    assert session.owed == 0
    assert [(id, reply) for id, reply, _ in session.route.take()] == [(1, m.Done())]


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


def test_an_expired_lease_that_was_confirmed_is_the_takers(effects: MemoryEffects) -> None:
    session = effects.session()
    register(effects, session, ttl=5.0)
    effects.service.handle(session, 1, m.Take("x"), [], 0.0)
    ((_, _, (_, taker)),) = session.route.take()
    assert effects.say(taker, "confirmed")
    effects.service.tick(5.0)
    assert effects.service.counters["expired"] == 0
    assert not effects.table.entries


def test_everything_is_counted(effects: MemoryEffects) -> None:
    session = effects.session()
    register(effects, session)
    register(effects, session, "brief", ttl=5.0)
    for id, word in ((1, "dropped"), (2, "confirmed")):
        effects.service.handle(session, id, m.Take("x"), [], 0.0)
        (_, _, (_, taker)) = session.route.sent.pop()
        assert effects.say(taker, word)  # type: ignore[arg-type]
        effects.service.lease_moved(id, 0.0)
    effects.service.handle(session, 3, m.Fetch("brief"), [], 0.0)
    effects.service.handle(session, 4, m.Fetch("late", wait=1.0), [], 0.0)
    effects.service.tick(5.0)
    assert effects.service.counters == {
        "requests": 6,
        "refused": 1,  # the wait that was over
        "registered": 2,
        "fetched": 1,
        "taken": 2,
        "returned": 1,
        "expired": 1,
    }


def test_an_expired_lease_is_revoked(effects: MemoryEffects) -> None:
    """Who confirms afterwards is told that it has nothing."""
    session = effects.session()
    register(effects, session, ttl=5.0)
    effects.service.handle(session, 1, m.Take("x"), [], 0.0)
    ((_, _, (_, taker)),) = session.route.take()
    effects.service.tick(5.0)
    assert not effects.table.entries
    assert not effects.say(taker, "confirmed")


def test_limits_of_the_whole_server_count_the_new_without_the_replaced() -> None:
    limits = msgspec.structs.replace(Limits.for_rlimit(1000), max_names=2, max_descriptors=5)
    effects = MemoryEffects(limits=limits)
    session = effects.session()
    register(effects, session, "a", count=3)
    register(effects, session, "b", count=2)
    for name, count, replace, what in (
        ("c", 1, False, "max_names"),
        ("b", 3, True, "max_descriptors"),
    ):
        with pytest.raises(QuotaExceeded) as caught:
            register(effects, session, name, count=count, replace=replace)
        assert caught.value.what == what
    register(effects, session, "b", count=1, replace=True)
    register(effects, session, "a", count=4, replace=True)


def test_what_takers_have_confirmed_makes_room_before_anybody_is_refused() -> None:
    """Also before the loop has heard of it: as names, and as descriptors."""
    for changed in ({"max_names": 1}, {"max_descriptors": 3}):
        effects = MemoryEffects(
            limits=msgspec.structs.replace(Limits.for_rlimit(1000), **changed)  # type: ignore[arg-type]
        )
        session = effects.session()
        register(effects, session, "a", count=2)
        effects.service.handle(session, 1, m.Take("a"), [], 0.0)
        ((_, _, (*_, taker)),) = session.route.take()
        with pytest.raises(QuotaExceeded):
            register(effects, session, "b", count=2)
        assert effects.say(taker, "confirmed")
        register(effects, session, "b", count=2)
        assert list(effects.table.entries) == ["b"]
