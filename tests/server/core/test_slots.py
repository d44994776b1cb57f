"""Slots: a name that changes has another stamp, before anybody hears of the change."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdshare.errors import AccessDenied, FetchTimeout, NameNotFound
from fdshare.protocol import messages as m
from fdshare.server.core.policy import Policy
from fdshare.server.core.ports import Session
from fdshare.server.core.slots import FIRST, NOWHERE, SHARED, Slots
from server.memory_effects import ArrayPage, Everybody, MemoryEffects, register


@pytest.fixture
def page() -> ArrayPage:
    """Room for three names, and the shared slot."""
    return ArrayPage(FIRST + 3)


@pytest.fixture
def effects(page: ArrayPage) -> MemoryEffects:
    return MemoryEffects(page=page)


def changed(name: str, old: str = "") -> m.Event:
    return m.Event(1, "replaced", name, 1, old)


def follow(effects: MemoryEffects, session: Session, name: str = "x", **fields: Any) -> Any:
    """(reply, handles) of the follow. Raises the refusal."""
    effects.service.handle(session, 1, m.Follow(name, **fields), [], 0.0)
    _, reply, handles = session.route.sent.pop()
    return reply, handles


def fresh(effects: MemoryEffects, reply: m.Followed) -> bool:
    """What a follower sees."""
    assert effects.page is not None
    return effects.page.words[reply.slot] == reply.stamp


def test_a_name_keeps_its_place_until_it_changes(page: ArrayPage) -> None:
    slots = Slots(page)
    place = slots.place("a")
    assert place.slot >= FIRST
    assert slots.place("a") == place
    slots.changed([changed("b")])
    assert slots.place("a") == place
    slots.changed([changed("a")])
    assert page.words[place.slot] != place.stamp
    slots.changed([changed("c", old="b")])
    b = slots.place("b")
    slots.changed([changed("c", old="b")])
    assert page.words[b.slot] != b.stamp


def test_names_beyond_the_slots_share_one(page: ArrayPage) -> None:
    slots = Slots(page)
    own = [slots.place(name) for name in "abc"]
    assert len({place.slot for place in own}) == 3
    more = [slots.place(name) for name in "de"]
    assert [place.slot for place in more] == [SHARED, SHARED]
    assert [page.words[SHARED]] * 2 == [place.stamp for place in more]
    slots.changed([])
    assert page.words[SHARED] == more[-1].stamp
    slots.changed([changed("nobody follows it")])
    assert page.words[SHARED] != more[-1].stamp
    assert [page.words[place.slot] for place in own] == [place.stamp for place in own]
    slots.changed([changed("a")])  # which leaves its slot to the next
    assert slots.place("d").slot == own[0].slot


def test_without_a_page_followers_look_nowhere() -> None:
    slots = Slots(None)
    assert slots.place("a") == NOWHERE
    slots.changed([changed("a")])
    slots.changed_all()


def test_where_the_kernel_has_no_memory_followers_look_nowhere(page: ArrayPage) -> None:
    slots = Slots(page)
    page.full = True
    assert [slots.place(name) for name in "abcdefgh"] == [NOWHERE] * 8
    page.full = False
    assert slots.place("a").slot >= FIRST


def test_a_successor_writes_new_stamps_into_all_slots(page: ArrayPage) -> None:
    slots = Slots(page)
    places = [slots.place(name) for name in "abcd"]
    slots = Slots(page)
    assert all(page.words[place.slot] > place.stamp for place in places)
    slots.place("other")  # in the slot that "a" had
    assert all(page.words[place.slot] > place.stamp for place in places)


STEPS = st.lists(
    st.tuples(st.sampled_from(["follow", "change", "all", "succeed"]), st.sampled_from("abcdef"))
)


@given(STEPS)
def test_a_stamp_that_stands_means_that_nothing_has_changed(steps: list[tuple[str, str]]) -> None:
    page = ArrayPage(FIRST + 3)
    slots = Slots(page)
    changes = dict.fromkeys("abcdef", 0)
    followers = []
    for step, name in steps:
        if step == "follow":
            followers.append((name, changes[name], slots.place(name)))
        elif step == "change":
            changes[name] += 1
            slots.changed([changed(name)])
        else:
            changes = {each: count + 1 for each, count in changes.items()}
            if step == "all":
                slots.changed_all()
            else:
                slots = Slots(page)
        for followed, count, place in followers:
            if page.words[place.slot] == place.stamp:
                assert count == changes[followed]


# The service.


def test_what_is_followed_is_given_once(effects: MemoryEffects, page: ArrayPage) -> None:
    session = effects.session()
    generation = register(effects, session).generation
    reply, handles = follow(effects, session)
    assert (reply.generation, reply.page, reply.mapped) == (generation, page.id, True)
    assert reply.kind == effects.table.entries["x"].put.kind
    assert handles == (*effects.table.entries["x"].handles, page.handle)
    again, handles = follow(effects, session, known=generation, epoch="epoch", page=page.id)
    assert (again.kind, again.mapped, handles) == (None, False, ())
    assert again.slot == reply.slot
    assert effects.table.entries["x"].fetches == 1
    for other in ({"known": generation}, {"known": 0, "epoch": "epoch"}):
        assert len(follow(effects, session, page=page.id, **other)[1]) == 1


def test_every_change_is_seen(effects: MemoryEffects) -> None:
    session = effects.session()
    register(effects, session)
    taker = effects.session()

    def take() -> None:
        effects.service.handle(taker, 5, m.Take("x"), [], 0.0)

    def give_back() -> None:
        effects.say(taker.route.take()[-1][2][-1], "dropped")
        effects.service.lease_moved(effects.table.last_lease, 0.0)

    changes = [
        lambda: register(effects, session, replace=True),
        lambda: effects.service.handle(session, 6, m.Rename("x", "y"), [], 0.0),
        lambda: effects.service.handle(session, 7, m.Rename("y", "x"), [], 0.0),
        take,
        give_back,
        lambda: effects.service.adopt(Everybody(1)),
        lambda: effects.service.handle(session, 8, m.Unregister("x"), [], 0.0),
    ]
    for change in changes:
        seen = []
        for name in ("x", "y"):
            try:
                seen.append(follow(effects, session, name)[0])
            except NameNotFound:
                continue
        assert all(fresh(effects, reply) for reply in seen)
        change()
        assert not any(fresh(effects, reply) for reply in seen)


def test_the_stamp_is_written_before_the_answer(effects: MemoryEffects) -> None:
    session = effects.session()
    register(effects, session)
    reply, _ = follow(effects, session)
    fresh_at_the_answer = []

    class Watchful(list[Any]):
        def append(self, sent: Any) -> None:
            fresh_at_the_answer.append(fresh(effects, reply))
            super().append(sent)

    session.route.sent = Watchful()
    register(effects, session, replace=True)
    assert fresh_at_the_answer == [False]


def test_a_follow_waits_for_its_name(effects: MemoryEffects) -> None:
    session = effects.session()
    with pytest.raises(NameNotFound):
        follow(effects, session)
    effects.service.handle(session, 1, m.Follow("x", 5.0), [], 0.0)
    assert session.route.sent == []
    effects.service.tick(5.0)
    refused = session.route.sent.pop()[1]
    assert isinstance(m.refusal_error(refused), FetchTimeout)
    effects.service.handle(session, 1, m.Follow("x", None), [], 0.0)
    register(effects, effects.session())
    _, reply, handles = session.route.sent.pop()
    assert fresh(effects, reply)
    assert len(handles) == 2


def test_the_right_is_that_of_fetch(effects: MemoryEffects) -> None:
    register(effects, effects.session())
    with pytest.raises(AccessDenied) as caught:
        follow(effects, effects.session(uid=2))
    assert caught.value.verb == "fetch"
    waiting = effects.session(uid=3)
    effects.service.adopt(Everybody(1))
    effects.service.handle(waiting, 1, m.Follow("later", None), [], 0.0)
    effects.service.adopt(Policy(1))
    assert isinstance(m.refusal_error(waiting.route.sent.pop()[1]), AccessDenied)
