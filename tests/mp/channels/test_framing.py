"""Messages on the socket, of any size and with any number of descriptors, in any order."""

from __future__ import annotations

import os
import socket
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdshare.mp.channels.framing import (
    BODY_FOLLOWS,
    BOXED,
    JOINED,
    LARGEST,
    LARGEST_SHORT,
    LENGTH,
    LONG_FOLLOWS,
    PLAIN,
    SHORT_BODY,
    headed,
)
from fdshare.mp.channels.receiving import MessageReceiver
from fdshare.mp.pickling.bundle import Bundle
from mp.common import (
    READERS,
    Pair,
    Read,
    expecting_or_not,
    open_now,
    read_message,
    received,
    send,
)


def test_without_descriptors_it_is_what_multiprocessing_sends(pair: Pair) -> None:
    from multiprocessing.connection import Connection

    left, right = pair
    with Connection(os.dup(left.fileno())) as stock:
        for data in (b"", b"x", b"y" * JOINED, b"z" * 50000):
            stock.send_bytes(data)
            assert read_message(right) == data
            send(right, Bundle(data))
            assert stock.recv_bytes() == data
    assert headed(b"abc") == b"\0\0\0\3abc"


@expecting_or_not
@pytest.mark.parametrize("count", [1, 2, 252, 253, 254, 507])
@pytest.mark.parametrize("size", [1, JOINED, JOINED + 1, 100_000])
def test_any_size_with_any_number(pair: Pair, null: int, count: int, size: int, read: Read) -> None:
    left, right = pair
    data = os.urandom(size)
    before = open_now()
    send(left, Bundle(data, [null] * count))
    assert received(read(right)) == (data, count)
    assert open_now() == before


@given(
    st.lists(st.tuples(st.binary(max_size=300), st.integers(0, 3)), max_size=12),
    st.sampled_from(READERS),
)
def test_any_sequence_arrives_in_order(messages: list[tuple[bytes, int]], read: Read) -> None:
    left, right = socket.socketpair()
    with left, right, open(os.devnull) as null:
        for data, count in messages:
            bundle = Bundle(data, [null.fileno()] * count)
            send(left, bundle)
        for expected in messages:
            assert received(read(right)) == expected


@expecting_or_not
def test_lengths_above_two_gigabytes_have_eight_bytes(pair: Pair, read: Read) -> None:
    left, right = pair
    left.send(struct.pack("!iQ", -1, 5) + b"large")
    assert read(right) == b"large"
    left.send(struct.pack("!iQ", -1, 5) + b"large")
    assert MessageReceiver(right, False, None).receive_bytes(None) == b"large"


def test_no_length_and_no_announcement_begins_as_a_body() -> None:
    heads = [headed(b"")[0], LENGTH.pack(LARGEST)[0], LENGTH.pack(LONG_FOLLOWS)[0]]
    heads += [LENGTH.pack(BODY_FOLLOWS)[0], LENGTH.pack(SHORT_BODY - LARGEST_SHORT)[0]]
    assert not {PLAIN, BOXED} & {*heads, *range(0x80), 0xFF}
    assert heads[2:] == [0xFF] * 3
