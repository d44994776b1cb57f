"""conversation: what is an answer to a request, and what is more or less than one."""

from __future__ import annotations

import pytest

from fdshare.client.conversation import Conversation, Parts
from fdshare.errors import NameNotFound
from fdshare.protocol import messages as m
from fdshare.protocol.framing import header
from fdshare.protocol.kind import Kind

REPLY = m.Given("x", 1, Kind("descriptor", m.msgspec.Raw(b"\xc0")))


def frame(reply: m.Reply, id: int = 7, count: int = 0) -> bytes:
    body = m.encode(reply)
    return header(len(body), count, id) + body


def test_one_frame_is_a_whole_answer() -> None:
    whole = Conversation().whole(memoryview(frame(REPLY)), [], None, 7)
    assert whole == Parts([REPLY], [])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        frame(REPLY)[:-1],
        frame(REPLY) + b"\0",
        frame(REPLY) * 2,
        frame(REPLY, id=8),
        frame(REPLY, count=1),
        frame(m.NameList(["x"], more=True)),
        frame(m.refusal(NameNotFound("x"))),
        header(1, 0, 7) + b"\0",
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
def test_anything_else_is_not_taken(data: bytes) -> None:
    conversation = Conversation()
    assert conversation.whole(memoryview(data), [], None, 7) is None


def test_the_end_of_a_frame_is_no_whole_answer() -> None:
    conversation = Conversation()
    conversation.feed(memoryview(frame(REPLY)[:5]), [], None)
    assert conversation.whole(memoryview(frame(REPLY)), [], None, 7) is None


def test_where_descriptors_were_lost_it_is_not_whole() -> None:
    lost = NameNotFound("x")
    assert Conversation().whole(memoryview(frame(REPLY)), [], lost, 7) is None
