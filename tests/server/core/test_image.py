"""image: a table as data, and the equal table that is made of it."""

from __future__ import annotations

import msgspec

from fdshare.protocol import messages as m
from fdshare.server.core.image import Image, image_of, table_of
from fdshare.server.core.table import Table
from server.memory_effects import MemoryEffects, register


def again(table: Table) -> Table:
    """The table of the image of *table*, which went through bytes."""
    image, handles = image_of(table)
    return table_of(msgspec.msgpack.decode(msgspec.msgpack.encode(image), type=Image), handles)


def filled(effects: MemoryEffects) -> None:
    """A table with something of everything: what was moved, what lingers, what is leased."""
    session = effects.session(name="me")
    register(effects, session, "plain", count=2, metadata={"k": "v"}, ttl=9.0, id=1)
    register(effects, session, "old", lifetime="process", grace=5.0, id=2)
    effects.service.handle(session, 3, m.Rename("old", "moved"), [], 0.0)
    register(effects, session, "lingers", lifetime="process", grace=5.0, id=4)
    effects.service.hung_up(effects.table.entries["lingers"], 1.0, guard=True)
    register(effects, session, "leased", id=5)
    effects.service.handle(session, 6, m.Fetch("leased"), [], 0.0)
    effects.service.handle(session, 7, m.Take("leased"), [], 2.0)
    effects.service.handle(session, 8, m.Unregister("plain"), [], 0.0)
    register(effects, session, "plain", count=2, ttl=9.0, id=9)


def test_the_table_of_an_image_is_equal(effects: MemoryEffects) -> None:
    filled(effects)
    table, copy = effects.table, again(effects.table)
    assert list(copy.handles()) == list(table.handles())
    assert copy.descriptors == table.descriptors
    assert copy.usage(1) == table.usage(1)
    assert copy.answers == table.answers
    assert (copy.generation, copy.serial, copy.last_lease) == (6, table.serial, 1)
    for name, entry in table.entries.items():
        same = copy.entries[name]
        assert (same.name, same.generation, same.expires) == (name, entry.generation, entry.expires)
        assert (same.guard, same.lease, same.fetches) == (entry.guard, entry.lease, entry.fetches)
        assert same.put.metadata == entry.put.metadata
    assert copy.leases == {1: copy.entries["leased"]}
    assert copy.next_deadline() == table.next_deadline() == 6.0


def test_what_happens_to_both_afterwards_is_the_same(effects: MemoryEffects) -> None:
    filled(effects)
    copy = again(effects.table)
    effects.keeper = copy  # fed with what the journal carries from now on
    session = effects.session(name="me")
    effects.service.handle(session, 10, m.Unregister("moved"), [], 0.0)
    effects.service.tick(100.0)
    assert list(copy.entries) == list(effects.table.entries) == ["leased"]
    assert image_of(copy)[0].generation == image_of(effects.table)[0].generation


def test_the_image_of_nothing() -> None:
    copy = again(Table())
    assert (copy.entries, copy.leases, copy.generation, copy.next_deadline()) == ({}, {}, 0, None)


def test_the_oldest_lease_is_the_first(effects: MemoryEffects) -> None:
    """Whatever the order of the entries: the first one is looked at for its age."""
    session = effects.session()
    for name in "ab":
        register(effects, session, name)
    for id, name in enumerate("ba"):
        effects.service.handle(session, id, m.Take(name), [], float(id))
    image, handles = image_of(effects.table)
    assert list(table_of(image, handles).leases) == list(effects.table.leases) == [1, 2]
