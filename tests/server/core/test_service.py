"""The service where the model of test_registry.py does not reach: others, busy keepers, memory."""

from __future__ import annotations

import pytest

from fdshare.errors import (
    InvalidArgument,
    TooManyDescriptors,
)
from fdshare.protocol import messages as m
from server.memory_effects import MemoryEffects, register


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
