"""verbs: what each asks and what it makes of the answers, without a server and without waiting."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import pytest

from fdshare.client import conversation, verbs
from fdshare.client.conversation import LeaseEnd, WholeAnswer
from fdshare.errors import (
    KindMismatch,
    NameNotFound,
    ProtocolError,
    TooManyDescriptors,
)
from fdshare.kernel.descriptor import Descriptor
from fdshare.kinds import describe, register_kind, unregister_kind
from fdshare.protocol import messages as m

FD, _ = describe(0)


class Played:
    """A verb, the exchanges that it asked for, and its result once it has ended."""

    def __init__(self, steps: verbs.Steps[Any]) -> None:
        self.steps = steps
        self.ended = False
        self.result: Any = None
        self.asked: list[Any] = [next(steps)]

    def answer(self, *replies: m.Reply, descriptors: list[Descriptor] | None = None) -> Played:
        try:
            self.asked.append(self.steps.send(WholeAnswer(list(replies), descriptors or [])))
        except StopIteration as end:
            self.ended, self.result = True, end.value
        return self


def null() -> Descriptor:
    return Descriptor(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))


def register(obj: object, name: str = "a", **options: Any) -> verbs.Steps[m.Registered]:
    defaults = dict.fromkeys(("if_generation", "ttl", "metadata", "lifeline"))
    settings = {"replace": False, "lifetime": "server", "grace": 0.0, "drop_on_hangup": False}
    return verbs.register(name, obj, **{**defaults, **settings, **options})


# What is asked.


def test_register_lends_the_descriptors_and_the_lifeline() -> None:
    played = Played(register(0, metadata={"k": "v"}, lifetime="connection", lifeline=7, ttl=1.5))
    (exchange,) = played.asked
    assert exchange.fds == [0, 7]
    assert isinstance(exchange.request, m.Register)
    assert (exchange.request.name, exchange.request.ttl) == ("a", 1.5)
    assert exchange.request.metadata == {"k": "v"}
    assert played.answer(m.Registered("a", 3)).result == m.Registered("a", 3)


def test_too_many_descriptors_are_never_sent() -> None:
    class Bundle:
        pass

    register_kind(Bundle, "bundle", lambda _: (None, [0] * 251), lambda *_: None)
    try:
        with pytest.raises(TooManyDescriptors):
            next(register(Bundle()))
    finally:
        unregister_kind("bundle")


@pytest.mark.parametrize(
    ("steps", "request_", "wait"),
    [
        (lambda: verbs.fetch("a", 5.0), m.Fetch("a", 5.0), 5.0),
        (lambda: verbs.fetch_raw("a", 0.0), m.Fetch("a", 0.0), 0.0),
        (lambda: verbs.take("a", None), m.Take("a", None), None),
        (lambda: verbs.wait("a", 1.0), m.Wait("a", 1.0), 1.0),
        (lambda: verbs.unregister("a", 2), m.Unregister("a", 2), 0.0),
        (lambda: verbs.rename("a", "b"), m.Rename("a", "b"), 0.0),
        (lambda: verbs.bind("a", "tcp://:1", 5, True), m.Bind("a", "tcp://:1", 5, True), 0.0),
        (lambda: verbs.names("a/*"), m.Names("a/*"), 0.0),
        (lambda: verbs.holds("a*[?"), m.Names("a[*][[][?]"), 0.0),
        (lambda: verbs.info("a"), m.Info("a"), 0.0),
        (lambda: verbs.infos("*"), m.Infos("*"), 0.0),
        (lambda: verbs.explain("f", "a", 1, 2, (3,)), m.Explain("f", "a", 1, 2, [3]), 0.0),
        (lambda: verbs.stats(), m.Stats(), 0.0),
        (lambda: verbs.simple(m.Ping()), m.Ping(), 0.0),
    ],
)
def test_what_each_verb_asks(
    steps: Callable[[], verbs.Steps[Any]], request_: m.Request, wait: float | None
) -> None:
    """Who waits longer than usual says so: the deadline of the request depends on it."""
    (exchange,) = Played(steps()).asked
    assert (exchange.request, exchange.wait, list(exchange.fds)) == (request_, wait, [])


# What is made of the answers.


def test_lists_come_in_parts() -> None:
    played = Played(verbs.names("*"))
    played.answer(m.NameList(["a"], more=True), m.NameList(["b"]))
    assert played.result == ["a", "b"]
    assert Played(verbs.holds("a")).answer(m.NameList([])).result is False


def test_info_of_nothing_is_not_found() -> None:
    with pytest.raises(NameNotFound):
        Played(verbs.info("a")).answer(m.InfoList([]))
    assert Played(verbs.infos("a")).answer(m.InfoList([])).result == []


@pytest.mark.parametrize(
    ("steps", "reply"),
    [
        (lambda: verbs.fetch("a", 0.0), m.Done()),
        (lambda: verbs.names("*"), m.Done()),
        (lambda: verbs.unregister("a", None), m.Done()),  # with a descriptor
        (lambda: verbs.take("a", 0.0), m.Registered("a", 1)),
        (lambda: verbs.fetch_many(["a"]), m.NameList(["a"])),
        (lambda: verbs.fetch("a", 0.0), m.Given("a", 1, m.Kind("connection", m.encode({})))),
    ],
)
def test_an_answer_to_another_question_is_closed(
    steps: Callable[[], verbs.Steps[Any]], reply: m.Reply
) -> None:
    came = null()
    with pytest.raises((ProtocolError, KindMismatch)):
        Played(steps()).answer(reply, descriptors=[came])
    assert came.closed


# Take.


def lease() -> tuple[Descriptor, socket.socket]:
    """The taker's end, and the server's."""
    ours, theirs = socket.socketpair()
    return Descriptor(ours.detach()), theirs


def test_a_take_is_confirmed_once_the_object_is_there() -> None:
    """And it is over when the server has closed what was taken: its end of the lease comes last."""
    end, server = lease()
    with server:
        played = Played(verbs.take_raw("a", 0.0))
        played.answer(m.Given("a", 1, FD, lease=True), descriptors=[null(), end])
        assert server.recv(10) == b"\1"
        assert not played.ended
        step = played.asked[-1]
        assert isinstance(step, LeaseEnd)
        server.shutdown(socket.SHUT_WR)
        step.wait()
        played.answer()
        assert server.recv(10) == b""
        (descriptor,) = played.result
        descriptor.close()


def test_a_lease_that_never_ends_is_not_waited_for_without_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(conversation, "LEASE_END", 0.01)
    near, far = socket.socketpair()
    with near, far:
        LeaseEnd(near).wait()


@pytest.mark.usefixtures("no_sigpipe")
@pytest.mark.parametrize("verb", [verbs.take, verbs.take_raw])
def test_a_revoked_take_is_closed_and_asked_again(verb: Any) -> None:
    end, server = lease()
    server.close()  # it was replaced, say
    came = null()
    played = Played(verb("a", 3.0))
    played.answer(m.Given("a", 1, FD, lease=True), descriptors=[came, end])
    assert not played.ended
    assert came.closed
    assert [exchange.request for exchange in played.asked] == [m.Take("a", 3.0)] * 2


def test_what_cannot_be_rebuilt_is_not_confirmed() -> None:
    """The entry goes back: the lease ends without a word."""
    end, server = lease()
    came = null()
    with server, pytest.raises(KindMismatch):
        kind = m.Kind("connection", m.encode({}))
        Played(verbs.take("a", 0.0)).answer(
            m.Given("a", 1, kind, lease=True), descriptors=[came, end]
        )
    assert came.closed


def test_a_take_without_a_lease() -> None:
    with pytest.raises(ProtocolError, match="no lease"):
        Played(verbs.take("a", 0.0)).answer(m.Given("a", 1, FD))


# Fetch many.


def items(*counts: tuple[str, int]) -> m.GivenMany:
    return m.GivenMany([m.GivenItem(name, 1, FD, count) for name, count in counts])


def test_fetch_many_asks_for_what_is_left() -> None:
    played = Played(verbs.fetch_many(["a", "b", "a", "c"]))
    assert played.asked[0].request == m.FetchMany(["a", "b", "c"])
    played.answer(items(("a", 1), ("b", 1)), descriptors=[null(), null()])
    assert played.asked[1].request == m.FetchMany(["c"])
    played.answer(items(("c", 1)), descriptors=[null()])
    assert list(played.result) == ["a", "b", "c"]
    for descriptor in played.result.values():
        descriptor.close()


def test_fetch_many_learns_of_all_that_is_missing() -> None:
    """What one answer has no place for is asked for, too."""
    names = [f"n{i}" for i in range(300)]
    played = Played(verbs.fetch_many(names))
    assert played.asked[0].request == m.FetchMany(names[:253])
    played.answer(m.GivenMany([], [1, 252]), descriptors=[null()])
    assert played.asked[1].request == m.FetchMany(names[253:])
    with pytest.raises(NameNotFound) as caught:
        played.answer(m.GivenMany([], [0]))
    assert caught.value.names == ["n1", "n252", "n253"]
    assert str(caught.value).endswith("'n253'")


@pytest.mark.parametrize("missing", [[-1], [0, 2]])
def test_names_that_were_not_asked_for_are_missing(missing: list[int]) -> None:
    with pytest.raises(ProtocolError):
        Played(verbs.fetch_many(["a", "b"])).answer(m.GivenMany([], missing))


def test_no_names_ask_for_nothing() -> None:
    with pytest.raises(StopIteration) as end:
        next(verbs.fetch_many([]))
    assert end.value.value == {}


@pytest.mark.parametrize(
    "answer",
    [
        items(),
        items(("b", 1)),
        items(("a", 2)),
        items(("a", 0)),
        items(("a", 2), ("b", -1)),
        items(("a", 1), ("c", 0)),
    ],
)
def test_items_that_do_not_fit_are_closed(answer: m.GivenMany) -> None:
    came = null()
    with pytest.raises(ProtocolError):
        Played(verbs.fetch_many(["a", "b"])).answer(answer, descriptors=[came])
    assert came.closed


def test_all_or_nothing_over_several_answers() -> None:
    came = null()
    played = Played(verbs.fetch_many(["a", "b"]))
    played.answer(items(("a", 1)), descriptors=[came])
    with pytest.raises(NameNotFound):
        played.steps.throw(NameNotFound("b"))
    assert came.closed
