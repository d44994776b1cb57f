"""Messages that come in pieces, at the limit, at the end, or are not what was announced."""

from __future__ import annotations

import os
import socket

import pytest

from fdshare.errors import DescriptorLimit, InvalidArgument, ProtocolError
from fdshare.kernel.ancillary import MAX_DESCRIPTORS, send_message
from fdshare.mp.channels.framing import framed
from fdshare.mp.channels.receiving import (
    marked,
    read_bytes,
    read_expected,
    read_message,
    read_without,
)
from fdshare.mp.channels.sending import Outgoing, send_now
from fdshare.mp.pickling.bundle import Bundle
from mp.common import (
    Pair,
    Read,
    descriptor_limit_reached,
    expecting_or_not,
    open_now,
    read_expecting,
    received,
)


@expecting_or_not
def test_a_body_that_comes_in_pieces(pair: Pair, null: int, read: Read) -> None:
    left, right = pair
    announcement, body = framed(b"data" * 10, 1)
    pid = os.fork()
    if pid == 0:
        for byte in announcement:
            left.send(bytes([byte]))
        send_message(left, [body[:1]], [null])
        for byte in body[1:]:
            left.send(bytes([byte]))
        os._exit(0)
    assert received(read(right, False)) == (b"data" * 10, 1)
    os.waitpid(pid, 0)


@expecting_or_not
@pytest.mark.parametrize("count", [1, 300])
def test_at_the_limit_nothing_is_lost(pair: Pair, null: int, count: int, read: Read) -> None:
    left, right = pair
    Outgoing(Bundle(b"data", [null] * count)).push(left)
    send_now(left, b"next", 0)
    with descriptor_limit_reached():
        for _ in range(2):
            with pytest.raises(DescriptorLimit):
                read(right, marked(right))
    # Where the announcement could not be looked at beside the body, the socket remembers it.
    assert marked(right) == (read is read_message or count > MAX_DESCRIPTORS)
    assert received(read(right, marked(right))) == (b"data", count)
    assert not marked(right)
    assert read(right, False) == b"next"


def test_what_a_plain_message_is_before_stays(pair: Pair, null: int) -> None:
    left, right = pair
    send_now(left, b"plain", 0)
    send_now(left, Bundle(b"data", [null]), 0)
    before = open_now()
    assert read_expected(right) is None
    assert open_now() == before
    assert read_message(right, False) == b"plain"
    assert received(read_expecting(right, False)) == (b"data", 1)


def test_what_another_left_is_not_taken_for_a_message(pair: Pair, null: int) -> None:
    left, right = pair
    send_now(left, Bundle(b"data", [null]), 0)
    assert right.recv(4)[0] == 0xFF  # another reader's, which met the limit then
    assert read_expected(right) is None
    assert received(read_message(right, True)) == (b"data", 1)


@expecting_or_not
def test_without_its_descriptors(pair: Pair, null: int, read: Read) -> None:
    left, right = pair
    send_now(left, Bundle(b"data", [null]), 0)
    send_now(left, b"next", 0)
    with descriptor_limit_reached(), pytest.raises(DescriptorLimit):
        read(right, False)
    assert read_without(right, marked(right)) == b"data"
    assert read(right, marked(right)) == b"next"


@expecting_or_not
def test_bytes_only(pair: Pair, null: int, read: Read) -> None:
    left, right = pair
    send_now(left, b"12345", 0)
    assert read_bytes(right, False, 5) == b"12345"
    send_now(left, b"123456", 0)
    assert read_bytes(right, False, 5) is None
    assert right.recv(99) == b"123456"
    send_now(left, Bundle(b"data", [null]), 0)
    for announced in (False, True):
        with pytest.raises(InvalidArgument):
            read_bytes(right, announced, None)
    assert received(read(right, True)) == (b"data", 1)


@expecting_or_not
@pytest.mark.parametrize("arriving", [0, 2, 3])
def test_another_number_than_announced(pair: Pair, null: int, arriving: int, read: Read) -> None:
    left, right = pair
    announcement, body = framed(b"data", 1)
    left.send(announcement)
    send_message(left, [body], [null] * arriving)
    left.close()
    before = open_now()
    with pytest.raises(ProtocolError):
        read(right, False)
    assert open_now() == before


@expecting_or_not
@pytest.mark.parametrize("cut", range(1, 25))
def test_an_end_anywhere(null: int, cut: int, read: Read) -> None:
    announcement, body = framed(b"data", 1)
    left, right = socket.socketpair()
    with right:
        with left:
            left.send(announcement[:cut])
            if cut > len(announcement):
                send_message(left, [body[: cut - len(announcement)]], [null])
        before = open_now()
        whole = len(announcement) + len(body)
        if cut < whole:
            with pytest.raises((EOFError, OSError)):
                read(right, False)
        else:
            assert received(read(right, False)) == (b"data", 1)
        assert open_now() == before
