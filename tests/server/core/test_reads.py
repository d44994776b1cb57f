"""reads: what is given, and listed, and explained, without a change of the table."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from fdshare.protocol import messages as m
from fdshare.protocol.framing import MAX_FRAME
from fdshare.server.core.ports import Session
from fdshare.server.core.reads import GivenTogether
from fdshare.server.core.waiters import PART
from server.memory_effects import Everybody, MemoryEffects, register


def ask(effects: MemoryEffects, session: Session, request: m.Request) -> list[Any]:
    """The replies to *request*."""
    effects.service.handle(session, 99, request, [], 0.0)
    return [reply for id, reply, _ in session.route.take() if id == 99]


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


@pytest.mark.parametrize("tag", ["t", "\N{GRINNING FACE}" * 4000])
def test_fetch_many_of_long_kinds_gives_what_fits(effects: MemoryEffects, tag: str) -> None:
    session = effects.session()
    spec = msgspec.Raw(m.encode("s" * (16_300 - len(tag.encode()))))
    names = [f"{number:04}" + "n" * 251 for number in range(130)]
    for id, name in enumerate(names, start=1):
        request = m.Register(name, m.Kind(tag, spec))
        assert effects.service.handle(session, id, request, effects.new_handles(1), 0.0)
    session.route.take()
    asked = names
    answers = []
    while asked:
        (reply,) = ask(effects, session, m.FetchMany(asked))
        answers.append([item.name for item in reply.items])
        assert len(m.encode(reply)) <= MAX_FRAME
        asked = asked[len(answers[-1]) :]
    assert [name for answer in answers for name in answer] == names
    assert [len(answer) for answer in answers] == [62, 62, 6]


def test_a_renamed_entry_answers_by_its_new_name(effects: MemoryEffects) -> None:
    session = effects.session()
    register(effects, session, "old")
    effects.service.handle(session, 1, m.Fetch("old"), [], 0.0)  # its answer is encoded, and kept
    effects.service.handle(session, 2, m.Rename("old", "new"), [], 0.0)
    effects.service.handle(session, 3, m.Fetch("new"), [], 0.0)
    _, (_, renamed, _), (_, given, _) = session.route.take()
    assert (given.name, given.generation) == ("new", renamed.generation)


def test_names_are_those_of_now(effects: MemoryEffects) -> None:
    """The list is kept encoded: each change that is seen in it makes another."""
    session = effects.session()

    def names() -> list[str]:
        first, again = (ask(effects, session, m.Names("*"))[0].names for _ in range(2))
        assert first == again == ask(effects, session, m.Names("?"))[0].names
        return list(first)

    def do(request: m.Request) -> Any:
        effects.service.handle(session, 5, request, [], 0.0)
        return session.route.take()[0]

    assert names() == []
    register(effects, session, "b")
    assert names() == ["b"]
    register(effects, session, "a", ttl=10)
    assert names() == ["a", "b"]
    do(m.Rename("b", "c"))
    assert names() == ["a", "c"]
    _, _, handles = do(m.Take("c"))
    assert names() == ["a"]
    effects.say(handles[-1], "dropped")
    assert names() == ["a", "c"]
    _, _, handles = do(m.Take("c"))
    effects.say(handles[-1], "confirmed")
    assert names() == ["a"]
    effects.service.tick(10.0)
    assert names() == []


def test_a_look_is_not_counted(effects: MemoryEffects) -> None:
    session = effects.session()
    effects.service.handle(session, 1, m.Fetch("x", 5.0, look=True), [], 0.0)
    register(effects, session)
    ask(effects, session, m.Fetch("x", look=True))
    assert effects.table.entries["x"].fetches == 0
    assert effects.service.counters["fetched"] == 2


def test_the_same_fetch_again_is_counted(effects: MemoryEffects) -> None:
    session, stranger = effects.session(), effects.session(uid=2)
    register(effects, session)
    again = effects.service.fetch_again
    assert again(session, "x") is None  # its answer has not been encoded yet
    ask(effects, session, m.Fetch("x"))
    entry = again(session, "x")
    assert entry is effects.table.entries["x"]
    assert (entry.fetches, effects.service.counters["fetched"]) == (2, 2)
    assert again(stranger, "x") is None
    assert again(session, "y") is None
    ask(effects, session, m.Take("x"))
    assert again(session, "x") is None  # leased
    assert effects.service.counters["fetched"] == 2


def test_the_same_fetch_of_many_again_is_counted_until_anything_changes(
    effects: MemoryEffects,
) -> None:
    session, stranger = effects.session(), effects.session(uid=2)
    for name in ("a", "b", "c"):
        register(effects, session, name)
    again = effects.service.fetch_again
    names = ("b", "a")

    def given() -> tuple[list[str], list[Any]]:
        once, twice = again(session, names), again(session, names)
        assert once is twice
        assert isinstance(once, GivenTogether)
        reply = m.decode_reply(once.reply)
        assert isinstance(reply, m.GivenMany)
        return [item.name for item in reply.items], list(once.handles)

    changes = [
        lambda: register(effects, session, "a", replace=True),
        lambda: ask(effects, session, m.Rename("c", "d")),
        lambda: ask(effects, session, m.Unregister("d")),
        lambda: register(effects, session, "e"),
    ]
    for change in changes:
        assert again(session, names) is None  # it is not encoded yet, or not any more
        ask(effects, session, m.FetchMany(list(names)))
        held = [effects.table.entries[name] for name in names]
        fetches = [entry.fetches for entry in held]
        assert given() == (list(names), [handle for entry in held for handle in entry.handles])
        assert [entry.fetches for entry in held] == [count + 2 for count in fetches]
        assert again(stranger, names) is None
        assert again(session, ("a", "b")) is None
        change()
    ask(effects, session, m.FetchMany(list(names)))
    effects.service.handle(session, 1, m.Take("a"), [], 0.0)
    assert again(session, names) is None  # leased


def test_what_is_kept_of_fetches_of_many_is_bounded(effects: MemoryEffects) -> None:
    session = effects.session()
    register(effects, session, "a")
    register(effects, session, "b")
    for number in range(200):
        ask(effects, session, m.FetchMany(["a"] * number + ["b"]))
    kept = [n for n in range(200) if effects.service.fetch_again(session, ("a",) * n + ("b",))]
    assert 0 < len(kept) <= 64
    assert kept[-1] == 199


def test_fetch_many_names_all_that_is_missing(effects: MemoryEffects) -> None:
    session = effects.session()
    register(effects, session, "b")
    (reply,) = ask(effects, session, m.FetchMany(["a", "b", "c", "a"]))
    assert reply == m.GivenMany([], [0, 2, 3])
    assert effects.table.entries["b"].fetches == 0
    assert effects.service.counters["refused"] == 1
    (reply,) = ask(effects, session, m.FetchMany(["b", "b"]))
    assert [item.name for item in reply.items] == ["b"]
    assert effects.table.entries["b"].fetches == 1


@pytest.mark.parametrize(("count", "parts"), [(0, 1), (1, 1), (PART, 1), (PART + 1, 2)])
def test_long_lists_come_in_parts(effects: MemoryEffects, count: int, parts: int) -> None:
    effects.service.limits = msgspec.structs.replace(
        effects.service.limits, max_names=2 * PART, max_descriptors=2 * PART
    )
    session = effects.session()
    for number in range(count):
        register(effects, session, f"{number:05}")
    for request in (m.Names("*"), m.Watch("*")):
        replies = ask(effects, session, request)
        assert [reply.more for reply in replies] == [True] * (parts - 1) + [False]
        held = [reply.names if request == m.Names("*") else reply.entries for reply in replies]
        assert [name for part in held for name in part] == sorted(effects.table.entries)


def test_what_is_leased_is_in_no_list(effects: MemoryEffects) -> None:
    session = effects.session()
    register(effects, session, "a")
    register(effects, session, "b")
    effects.service.handle(session, 1, m.Take("a"), [], 0.0)
    ((_, _, (_, taker)),) = session.route.take()
    assert ask(effects, session, m.Names("*"))[0].names == ["b"]
    assert ask(effects, session, m.Watch("*"))[0].entries == {"b": 2}
    assert effects.say(taker, "dropped")
    assert ask(effects, session, m.Names("*"))[0].names == ["a", "b"]  # it is asked first


def test_a_cancelled_wait_is_answered(effects: MemoryEffects) -> None:
    session = effects.session()
    effects.service.handle(session, 1, m.Fetch("x", 60.0), [], 0.0)
    effects.service.handle(session, 2, m.Cancel(1), [], 0.0)
    ((id, refused, _),) = session.route.take()
    assert (id, refused.code) == (1, "fetch_timeout")
    assert effects.service.next_deadline() is None
    register(effects, session)
    assert not session.route.take()


def test_a_cancelled_watch_is_answered_and_told_no_more(effects: MemoryEffects) -> None:
    session = effects.session()
    effects.service.handle(session, 1, m.Watch("*"), [], 0.0)
    effects.service.handle(session, 2, m.Cancel(1), [], 0.0)
    _, (id, done, _) = session.route.take()
    assert (id, done) == (1, m.Done())
    register(effects, effects.session())
    assert not session.route.take()
    effects.service.handle(session, 3, m.Cancel(1), [], 0.0)  # the answer was on its way
    assert not session.route.take()


def test_explain_knows_the_registrant(effects: MemoryEffects) -> None:
    """To replace or to remove is a registrant's, and a trusted user's, whatever the rules say."""
    effects.service.policy = Everybody(1)
    session = effects.session()
    register(effects, effects.session(uid=2))
    for verb, name, uid, allowed in (
        ("register", "x", 2, True),
        ("register", "x", 3, False),
        ("unregister", "x", 3, False),
        ("unregister", "x", 1, True),
        ("fetch", "x", 3, True),
        ("register", "free", 3, True),
    ):
        (reply,) = ask(effects, session, m.Explain(verb, name, uid, uid))
        assert reply.allowed == allowed, (verb, name, uid)
        assert reply.rule


def test_the_same_fetch_again_is_refused_where_the_audit_log_is_full(
    effects: MemoryEffects,
) -> None:
    """The quick way leaves it to the usual one, which refuses it."""
    session = effects.session()
    register(effects, session)
    ask(effects, session, m.Fetch("x"))
    effects.strict = True
    ask(effects, session, m.FetchMany(["x"]))
    assert effects.service.fetch_again(session, "x") is effects.table.entries["x"]
    assert effects.service.fetch_again(session, ("x",)) is not None
    effects.audit_full = True
    assert effects.service.fetch_again(session, "x") is None
    assert effects.service.fetch_again(session, ("x",)) is None
