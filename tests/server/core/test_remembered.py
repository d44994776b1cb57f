"""Remembered: how much of the memory for repeats each user has, and who is forgotten first."""

from __future__ import annotations

import msgspec
import pytest

from fdshare.errors import QuotaExceeded
from fdshare.protocol import messages as m
from fdshare.server.core.ports import JournalBusy
from fdshare.server.limits import Limits
from server.memory_effects import Everybody, MemoryEffects, register

LIMITS = msgspec.structs.replace(
    Limits.for_rlimit(1000), max_remembered=40_000, max_remembered_per_uid=20_000
)


@pytest.fixture
def effects() -> MemoryEffects:
    made = MemoryEffects(limits=LIMITS)
    made.service.policy = Everybody(1)
    return made


def come_and_go(effects: MemoryEffects, count: int, uid: int = 1501, first: int = 0) -> None:
    """So many clients make a change each, and leave before they have read the answer."""
    for number in range(first, first + count):
        session = effects.session(uid, f"{uid}-{number}")
        register(effects, session, f"x{uid}", replace=True)
        effects.service.disconnected(session, 100.0, unanswered=True)


def remembered(effects: MemoryEffects, uid: int = 1501) -> list[int]:
    assert effects.table.answers == effects.keeper.answers
    clients = (name.split("-") for name in effects.table.answers)
    return [int(number) for owner, number in clients if owner == str(uid)]


def test_those_who_are_absent_for_longest_are_forgotten_first(effects: MemoryEffects) -> None:
    come_and_go(effects, 100)
    kept = remembered(effects)
    assert kept == list(range(100 - len(kept), 100))
    assert 5 <= len(kept) <= 20_000 / 1024 + 1
    assert effects.service.next_deadline() == 100.0 + LIMITS.session_timeout
    effects.service.tick(100.0 + LIMITS.session_timeout)
    assert remembered(effects) == []
    assert effects.service.remembered.refusal(effects.session(1501).user) is None


def test_who_is_back_is_not_forgotten(effects: MemoryEffects) -> None:
    come_and_go(effects, 3)
    back = effects.session(1501, "1501-0")
    come_and_go(effects, 100, first=3)
    assert remembered(effects)[0] == 0
    effects.service.disconnected(back, 200.0, unanswered=True)
    come_and_go(effects, 2, first=200)
    assert 0 in remembered(effects)  # it is not absent for longest any more
    come_and_go(effects, 100, first=300)
    assert 0 not in remembered(effects)


def test_changes_are_refused_where_all_are_here(effects: MemoryEffects) -> None:
    here = [effects.session(1501, f"1501-{number}") for number in range(8)]
    with pytest.raises(QuotaExceeded) as refused:
        for round in range(64):
            for session in here:
                register(effects, session, replace=True, id=round + 1)
    assert refused.value.what == "max_remembered_per_uid"
    assert 20_000 < refused.value.used < 21_000
    serial = effects.table.serial
    for request in (m.Unregister("x"), m.Rename("x", "y")):
        with pytest.raises(QuotaExceeded):
            effects.service.handle(here[0], 99, request, [], 0.0)
    assert effects.table.serial == serial
    # A repeat is answered, and what changes nothing.
    register(effects, here[0], replace=True, id=1)
    effects.service.handle(here[0], 100, m.Fetch("x"), [], 0.0)
    effects.service.disconnected(here.pop(), 0.0)
    register(effects, here[0], replace=True)
    assert remembered(effects) == list(range(7))


def test_who_is_trusted_is_not_refused_and_not_forgotten(effects: MemoryEffects) -> None:
    come_and_go(effects, 100, uid=1)
    assert len(remembered(effects, 1)) == 100
    come_and_go(effects, 1)  # and others can still make changes
    assert remembered(effects) == [0]


def test_a_user_has_less_where_others_have_much(effects: MemoryEffects) -> None:
    for uid in (1501, 1502, 1503):
        come_and_go(effects, 100, uid)
    first, second, third = (len(remembered(effects, uid)) for uid in (1501, 1502, 1503))
    assert first > third > 0
    assert second > third


def test_the_clients_of_a_dead_server_count_when_they_are_back(effects: MemoryEffects) -> None:
    come_and_go(effects, 5)
    successor = MemoryEffects(limits=LIMITS)
    successor.service.policy = Everybody(1)
    for table in (successor.table, successor.keeper):
        table.answers = {name: kept.copy() for name, kept in effects.table.answers.items()}
    successor.service.expect(0.0)
    back = successor.session(1501, "1501-1")
    come_and_go(successor, 100, first=5)
    kept = remembered(successor)
    assert kept[:5] == [0, 1, 2, 3, 4]
    successor.service.disconnected(back, 100.0)
    come_and_go(successor, 100, first=200)
    assert len(remembered(successor)) == len(kept)  # one is gone, and there is room for another
    successor.service.tick(1000.0)
    assert remembered(successor) == []


def test_many_are_forgotten_in_several_turns(effects: MemoryEffects) -> None:
    """A record is written for each."""
    come_and_go(effects, 100, uid=1)
    effects.service.tick(1000.0)
    assert 0 < len(remembered(effects, 1)) < 100
    deadline = effects.service.next_deadline()
    assert deadline is not None
    assert deadline < 1000.0  # at once
    effects.service.tick(1000.0)
    assert remembered(effects, 1) == []


def test_a_keeper_that_is_busy_when_somebody_is_to_be_forgotten(effects: MemoryEffects) -> None:
    come_and_go(effects, 100)
    kept = remembered(effects)
    effects.busy = True
    with pytest.raises(JournalBusy):
        come_and_go(effects, 1, first=500)
    assert remembered(effects) == kept
    effects.busy = False
    come_and_go(effects, 1, first=501)
    assert remembered(effects)[-1] == 501
    assert len(remembered(effects)) <= len(kept) + 1
