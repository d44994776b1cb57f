"""conversation: bytes in, answers out; what is not well-formed closes what came with it."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable

import pytest
from hanging import ClosedWithError

from fdshare.client.conversation import Answer, Conversation, Exchange, WholeAnswer
from fdshare.errors import (
    AuthenticationFailed,
    DescriptorLimit,
    InvalidArgument,
    InvalidName,
    NameNotFound,
    ProtocolError,
    VersionMismatch,
)
from fdshare.kernel.descriptor import Descriptor
from fdshare.protocol import messages as m
from fdshare.protocol.auth import prove
from fdshare.protocol.framing import HEADER, MAX_FRAME, header

Made = Callable[[], Descriptor]

GIVEN = m.Given("a", 1, m.Kind("fd", m.encode({})))
LOST = DescriptorLimit(24, "RLIMIT_NOFILE", 10, 10, "client")


def frame(id: int, reply: m.Reply | m.Event, count: int = 0) -> bytes:
    body = m.encode(reply)
    return header(len(body), count, id) + body


def welcome(magic: str = m.MAGIC, version: int = m.VERSION, nonce: bytes = b"") -> m.Welcome:
    return m.Welcome(magic, version, 1, "epoch", MAX_FRAME, 253, 253, nonce)


def descriptor() -> Descriptor:
    return Descriptor(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))


def told(conversation: Conversation, data: bytes, *descriptors: Descriptor) -> list[Answer]:
    return conversation.feed(memoryview(data), list(descriptors), None)


def closed_with_error() -> Descriptor:
    return ClosedWithError(descriptor().detach())


# What close(2) says of what nobody gets replaces no other error.
whatever_close_says = pytest.mark.parametrize("made", [descriptor, closed_with_error])


@pytest.fixture
def conversation() -> Conversation:
    made = Conversation()
    made.hello()
    return made


# Requests.


def test_a_hello_says_the_session_anew_each_time() -> None:
    conversation = Conversation()
    first, second = conversation.hello(), conversation.hello()
    assert first == second
    request = m.decode_request(first[HEADER.size :])
    assert request == m.Hello(m.MAGIC, m.VERSION, conversation.session, b"")
    assert Conversation().session != conversation.session


def test_ids_begin_again_after_the_last_and_0_is_none(conversation: Conversation) -> None:
    assert [conversation.next_id(), conversation.next_id()] == [1, 2]
    conversation._last_id = 0xFFFFFFFE  # or the test would ask four thousand million times
    assert [conversation.next_id(), conversation.next_id()] == [0xFFFFFFFF, 1]


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (m.Fetch("\ud800", 0.0), InvalidName),
        (m.Register("a", m.Kind("fd", m.encode({})), ttl=1 << 70), InvalidArgument),
        (m.FetchMany(["x" * 250] * 5000), InvalidArgument),
        (m.Fetch(""), InvalidName),
        (m.Rename("a", "b/../c"), InvalidName),
        (m.Names("*" * 1021), InvalidArgument),
        (m.Bind("a", "tcp://example.org:80"), InvalidArgument),
        (m.Register("a", m.Kind("fd", m.encode({})), metadata={"k": "v" * 4096}), InvalidArgument),
    ],
)
def test_what_no_message_can_carry(
    conversation: Conversation, request_: m.Request, error: type[Exception]
) -> None:
    with pytest.raises(error):
        conversation.frame(1, request_, 0)


def test_a_deadline_is_that_of_the_request_and_the_wait() -> None:
    ping = m.Ping()
    assert Exchange(ping).deadline(100.0, 30.0) == 130.0
    assert Exchange(ping, wait=5.0).deadline(100.0, 30.0) == 135.0
    assert Exchange(ping, wait=None).deadline(100.0, 30.0) is None
    assert Exchange(ping).deadline(100.0, None) is None
    with pytest.raises(InvalidArgument):
        Exchange(ping, wait=math.nan).deadline(100.0, 30.0)


def test_a_repeat_waits_for_what_is_left() -> None:
    now = time.monotonic()
    exchange = Exchange(m.Fetch("a", 500.0), wait=500.0)
    exchange.shorten(now - 400.0)
    assert isinstance(exchange.request, m.Fetch)
    assert exchange.request.wait is not None
    assert 0 < exchange.request.wait <= 100.0
    exchange.shorten(now - 600.0)
    assert exchange.request.wait == 0.001  # 0 would be another request: one that does not wait
    for wait in (0.0, None):
        same = Exchange(m.Fetch("a", wait), wait=wait)
        same.shorten(now)
        assert same.request == m.Fetch("a", wait)


# Answers.


@pytest.mark.parametrize("step", [1, 7, 1000])
def test_answers_come_whole_however_the_bytes_come(conversation: Conversation, step: int) -> None:
    before = frame(0, welcome()) + frame(1, m.Done())
    data = before + frame(2, GIVEN, 1) + frame(3, m.Done())
    answers: list[Answer] = []
    for at in range(0, len(data), step):
        given = [descriptor()] if at <= len(before) < at + step else []
        answers += told(conversation, data[at : at + step], *given)
    assert [(answer.id, type(answer.reply)) for answer in answers] == [
        (1, m.Done),
        (2, m.Given),
        (3, m.Done),
    ]
    assert [len(answer.descriptors) for answer in answers] == [0, 1, 0]
    answers[1].descriptors[0].close()
    assert conversation.welcomes == 1


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (frame(0, welcome(magic="other")), ProtocolError),
        (frame(0, welcome(version=99)), VersionMismatch),
        (header(1, 0, 1) + b"\xc1", ProtocolError),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", (ProtocolError, VersionMismatch)),
    ],
)
@whatever_close_says
def test_what_is_no_answer_closes_what_came(
    conversation: Conversation, data: bytes, error: type[Exception], made: Made
) -> None:
    """Also what came before it, in the same read."""
    given = [made(), made()]
    with pytest.raises(error):
        told(conversation, frame(2, GIVEN, 2) + data, *given)
    assert all(one.closed for one in given)


@whatever_close_says
def test_a_new_connection_closes_what_was_half_received(
    conversation: Conversation, made: Made
) -> None:
    half = made()
    assert told(conversation, frame(1, GIVEN, 1)[:-1], half) == []
    conversation.hello()
    assert half.closed
    assert conversation.welcome is None
    assert told(conversation, frame(1, m.Done()))[0].reply == m.Done()


def test_one_frame_is_a_whole_answer(conversation: Conversation) -> None:
    whole = conversation.whole(memoryview(frame(7, m.Done())), [], None, 7)
    assert whole == WholeAnswer([m.Done()], [])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        frame(7, m.Done())[:-1],
        frame(7, m.Done()) + b"\0",
        frame(7, m.Done()) * 2,
        frame(8, m.Done()),
        frame(7, GIVEN, 1),
        frame(7, m.NameList(["x"], more=True)),
        frame(7, m.refusal(NameNotFound("x"))),
        header(1, 0, 7) + b"\xc1",
    ],
    ids=[
        "nothing",
        "less",
        "more",
        "two",
        "another id",
        "a descriptor is missing",
        "the first part",
        "a refusal",
        "no message",
    ],
)
def test_anything_else_is_not_taken(conversation: Conversation, data: bytes) -> None:
    assert conversation.whole(memoryview(data), [], None, 7) is None


def test_the_end_of_a_frame_is_no_whole_answer(conversation: Conversation) -> None:
    told(conversation, frame(7, m.Done())[:5])
    assert conversation.whole(memoryview(frame(7, m.Done())), [], None, 7) is None


def test_where_descriptors_were_lost_it_is_not_whole(conversation: Conversation) -> None:
    assert conversation.whole(memoryview(frame(7, m.Done())), [], LOST, 7) is None


# The parts of an answer.


def test_parts_are_put_together() -> None:
    parts = WholeAnswer()
    assert not parts.add(Answer(1, m.NameList(["a"], more=True), [], None))
    assert parts.add(Answer(1, m.NameList(["b"]), [], None))
    assert parts.finish().replies == [m.NameList(["a"], more=True), m.NameList(["b"])]


@pytest.mark.parametrize(
    ("last", "lost", "error"),
    [
        (GIVEN, LOST, DescriptorLimit),
        (m.refusal(NameNotFound("a")), None, NameNotFound),
        (m.refusal(NameNotFound("a")), LOST, NameNotFound),
    ],
)
@whatever_close_says
def test_what_is_not_whole_is_closed(
    last: m.Reply, lost: DescriptorLimit | None, error: type[Exception], made: Made
) -> None:
    parts, given = WholeAnswer(), [made(), made()]
    parts.add(Answer(1, m.NameList(["a"], more=True), given[:1], lost))
    assert parts.add(Answer(1, last, given[1:], None))
    with pytest.raises(error):
        parts.finish()
    assert all(one.closed for one in given)


# The authkey.


def authenticated(server_key: bytes, nonce: bytes = b"n" * 32) -> tuple[Conversation, m.Reply]:
    """A conversation that has sent its proof, and what a server with *server_key* says to it."""
    conversation = Conversation(b"key")
    hello = m.decode_request(conversation.hello()[HEADER.size :])
    assert isinstance(hello, m.Hello)
    told(conversation, frame(0, welcome(nonce=nonce)))
    proof = m.decode_request(conversation.proof()[HEADER.size :])
    assert proof == m.Prove(prove(b"key", "client", hello.nonce, nonce))
    return conversation, m.Proved(prove(server_key, "server", hello.nonce, nonce))


def test_both_sides_prove_that_they_have_the_key() -> None:
    conversation, proved = authenticated(b"key")
    conversation.check_proof(Answer(0, proved, [], None))


def test_each_connection_has_a_nonce_of_its_own() -> None:
    conversation = Conversation(b"key")
    assert conversation.hello() != conversation.hello()


def test_a_server_that_proves_nothing() -> None:
    conversation, proved = authenticated(b"other")
    for reply in (proved, m.Done(), m.Proved(b"")):
        with pytest.raises(AuthenticationFailed, match="another authkey"):
            conversation.check_proof(Answer(0, reply, [], None))
    with pytest.raises(AuthenticationFailed, match="they differ"):
        refused = m.refusal(AuthenticationFailed("they differ"))
        conversation.check_proof(Answer(0, refused, [], None))
    with pytest.raises(AuthenticationFailed, match="the server has no authkey"):
        authenticated(b"key", nonce=b"")
