"""Messages that do not fit at once, or are packed in boxes."""

from __future__ import annotations

import os
import socket

import pytest

from fdshare.kernel.ancillary import close_all
from fdshare.mp.channels.framing import JOINED
from fdshare.mp.channels.sending import Outgoing, push_short, short
from fdshare.mp.pickling.bundle import Bundle, Encoded
from mp.common import Pair, Read, expecting_or_not, identity, received


@expecting_or_not
def test_what_does_not_fit_is_sent_later(pair: Pair, null: int, read: Read) -> None:
    left, right = pair
    sent = 0
    while (rest := Outgoing(Bundle(b"x" * 900, [null]))).push_now(left):
        sent += 1
    assert not rest.push_now(left)
    rest.own()
    for _ in range(sent):
        assert received(read(right)) == (b"x" * 900, 1)
    assert rest.push_now(left)
    assert received(read(right)) == (b"x" * 900, 1)


@expecting_or_not
@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("size", [0, 1, JOINED])
def test_a_short_message_is_one_step(
    pair: Pair, null: int, size: int, at_once: bool, read: Read
) -> None:
    if at_once and read.__name__ == "read_message":
        pytest.skip("only who peeks may be sent both at once")
    left, right = pair
    data = b"x" * size
    messages: list[tuple[Encoded, int]] = [
        (data, 0),
        (Bundle(data), 0),
        ((data, [null]), 1),
        (Bundle(data, [null] * 3), 3),
    ]
    for message, count in messages:
        cell = [False]
        parts = short(message, at_once)
        assert parts is not None
        push_short(cell, left, parts, socket.MSG_DONTWAIT)
        assert cell[0]
        assert received(read(right)) == (data, count)


@pytest.mark.parametrize("count", [0, 1, 300])
def test_what_is_not_short(null: int, count: int) -> None:
    assert short(Bundle(b"x" * (JOINED + 1), [null] * count), False) is None


@pytest.mark.parametrize("count", [0, 1])
def test_it_knows_whether_a_reader_waits(pair: Pair, null: int, count: int) -> None:
    left, right = pair
    message = Outgoing(Bundle(b"x" * 2_000_000, [null] * count))
    assert message.unsent
    assert not message.begun
    assert not message.push_now(left)
    assert message.begun
    assert not message.unsent
    right.setblocking(False)
    while not message.push_now(left):
        right.recv(1 << 20)
    assert not message.begun
    assert not message.unsent


def test_the_rest_of_a_buffer_is_its_own(pair: Pair) -> None:
    left, right = pair
    data = bytearray(b"x" * 400_000)
    message = Outgoing(Bundle(memoryview(data)))
    assert not message.push_now(left)
    message.own()
    data[:] = b"y" * len(data)
    got = b""
    while len(got) < 4 + len(data):
        got += right.recv(1 << 20)
        message.push_now(left)
    assert got[4:] == b"x" * len(data)


@expecting_or_not
def test_a_box_holds_its_contents_until_sent(pair: Pair, read: Read) -> None:
    left, right = pair
    reader, writer = os.pipe()
    message = Outgoing(Bundle(b"data", [writer] * 600))
    os.close(writer)
    message.own()  # nothing to duplicate: the kernel has them
    message.push(left)
    bundle = read(right)
    assert isinstance(bundle, Bundle)
    assert len({identity(copy) for copy in bundle.owned or ()}) == 1
    close_all(bundle.owned or ())
    assert os.read(reader, 1) == b""
    os.close(reader)
