"""writes: who may change what, and what a repeat is answered."""

from __future__ import annotations

import pytest

from fdshare.errors import (
    AccessDenied,
    GenerationMismatch,
    NameNotFound,
)
from fdshare.protocol import messages as m
from fdshare.server.core.ports import LeaseState, Session
from fdshare.server.core.table import ANSWERS_KEPT
from server.memory_effects import Everybody, MemoryEffects, register


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


def test_a_bind_replaces_one_generation_of_its_registrant(effects: MemoryEffects) -> None:
    effects.service.policy = Everybody(1)
    mine, theirs = effects.session(2), effects.session(3)
    first = register(effects, mine)

    def bind(session: Session, replaces: int | None) -> int:
        asked = m.Bind("x", "tcp://127.0.0.1:0", replaces=replaces)
        effects.service.handle(session, 1, asked, [], 0.0)
        return effects.table.entries["x"].generation

    assert bind(mine, None) == first.generation
    assert bind(mine, first.generation + 1) == first.generation
    with pytest.raises(AccessDenied):
        bind(theirs, first.generation)
    effects.reached = set(effects.open)
    assert bind(mine, first.generation) == first.generation  # nothing is wrong with it
    effects.reached = set()
    assert bind(mine, first.generation) > first.generation
    assert len(effects.open) == 1


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


def test_what_a_watcher_sees_of_a_leased_name_that_is_replaced(effects: MemoryEffects) -> None:
    """The lease is revoked first: nobody sees a name replaced that he has seen taken."""
    session, watcher = effects.session(), effects.session()
    effects.service.handle(watcher, 1, m.Watch("*"), [], 0.0)
    register(effects, session)
    effects.service.handle(session, 1, m.Take("x"), [], 0.0)
    register(effects, session, replace=True)
    events = [sent[1].event for sent in watcher.route.take()[1:]]
    assert events == ["registered", "taken", "returned", "replaced"]


@pytest.mark.parametrize("verb", ["register", "unregister"])
def test_a_take_that_is_confirmed_between_two_looks(verb: str) -> None:
    """if_generation is about what is there; the taker has it."""

    class JustConfirmed(MemoryEffects):
        def lease_state(self, ours: int, *, revoke: bool = False) -> LeaseState:
            if revoke and self.leases[ours] == "held":
                self.leases[ours] = "confirmed"
            return super().lease_state(ours, revoke=revoke)

    effects = JustConfirmed()
    session = effects.session()
    generation = register(effects, session).generation
    effects.service.handle(session, 1, m.Take("x"), [], 0.0)
    with pytest.raises(GenerationMismatch if verb == "register" else NameNotFound):
        if verb == "register":
            register(effects, session, if_generation=generation)
        else:
            effects.service.handle(session, 2, m.Unregister("x", generation), [], 0.0)


def test_who_has_an_entry_that_ends_with_it_is_known(effects: MemoryEffects) -> None:
    """Its connection is the last to be closed where there are too many."""
    session = effects.session()
    register(effects, session, "a")
    assert not session.holds
    register(effects, session, "b", lifetime="process")
    assert session.holds
    register(effects, session, "c")
    assert session.holds
