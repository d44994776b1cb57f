"""Messages on the socket: split anywhere, of any size, cancelled, boxed."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable, Iterator
from typing import Final, TypeAlias

import pytest
from common import descriptor_limit_reached, identity, open_now
from hypothesis import given
from hypothesis import strategies as st

from fdshare.errors import DescriptorLimit, InvalidArgument, ProtocolError
from fdshare.kernel.ancillary import close_all, send_message
from fdshare.mp.frames import JOINED, framed, headed
from fdshare.mp.incoming import marked, read_bytes, read_expected, read_message, read_without
from fdshare.mp.outgoing import Outgoing, send_now
from fdshare.mp.transit import Bundle

Pair: TypeAlias = tuple[socket.socket, socket.socket]
Read: TypeAlias = Callable[[socket.socket, bool], bytes | Bundle]


def read_expecting(sock: socket.socket, announced: bool) -> bytes | Bundle:
    """As a connection does after messages with descriptors."""
    return read_expected(sock) or read_message(sock, announced)


READERS: Final[list[Read]] = [read_message, read_expecting]


@pytest.fixture(params=READERS)
def read(request: pytest.FixtureRequest) -> Read:
    """Whatever comes, it makes no difference what was expected."""
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def pair() -> Iterator[Pair]:
    left, right = socket.socketpair()
    with left, right:
        yield left, right


@pytest.fixture
def null() -> Iterator[int]:
    fd = os.open(os.devnull, os.O_RDONLY)
    yield fd
    os.close(fd)


def received(message: bytes | Bundle) -> tuple[bytes, int]:
    """The data, and how many descriptors came; closes them."""
    if isinstance(message, bytes):
        return message, 0
    count = len(message.owned or ())
    data = bytes(message.data)
    message.close()
    return data, count


def test_without_descriptors_it_is_what_multiprocessing_sends(pair: Pair) -> None:
    from multiprocessing.connection import Connection

    left, right = pair
    with Connection(os.dup(left.fileno())) as stock:
        for data in (b"", b"x", b"y" * JOINED, b"z" * 50000):
            stock.send_bytes(data)
            assert read_message(right, False) == data
            assert send_now(right, Bundle(data), 0) is None
            assert stock.recv_bytes() == data
    assert headed(b"abc") == b"\0\0\0\3abc"


@pytest.mark.parametrize("count", [1, 2, 252, 253, 254, 507])
@pytest.mark.parametrize("size", [1, JOINED, JOINED + 1, 100_000])
def test_any_size_with_any_number(pair: Pair, null: int, count: int, size: int, read: Read) -> None:
    left, right = pair
    data = os.urandom(size)
    before = open_now()
    message = Outgoing(Bundle(data, [null] * count))
    assert message.push(left, socket.MSG_DONTWAIT)
    assert received(read(right, False)) == (data, count)
    assert open_now() == before


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


@given(
    st.lists(st.tuples(st.binary(max_size=300), st.integers(0, 3)), max_size=12),
    st.sampled_from(READERS),
)
def test_any_sequence_arrives_in_order(messages: list[tuple[bytes, int]], read: Read) -> None:
    left, right = socket.socketpair()
    with left, right, open(os.devnull) as null:
        for data, count in messages:
            bundle = Bundle(data, [null.fileno()] * count)
            assert send_now(left, bundle, socket.MSG_DONTWAIT) is None
        for expected in messages:
            assert received(read(right, False)) == expected


def test_what_does_not_fit_is_sent_later(pair: Pair, null: int, read: Read) -> None:
    left, right = pair
    sent = 0
    while (rest := send_now(left, Bundle(b"x" * 900, [null]), socket.MSG_DONTWAIT)) is None:
        sent += 1
    assert not rest.push(left, socket.MSG_DONTWAIT)
    rest.own()
    for _ in range(sent):
        assert received(read(right, False)) == (b"x" * 900, 1)
    assert rest.push(left, socket.MSG_DONTWAIT)
    assert received(read(right, False)) == (b"x" * 900, 1)


@pytest.mark.parametrize("count", [1, 300])
def test_cancelled(pair: Pair, null: int, count: int, read: Read) -> None:
    left, right = pair
    message = Outgoing(Bundle(b"never", [null] * count))
    left.send(bytes(message.parts.pop(0)[0][0]))  # announced
    message.cancel(left)
    send_now(left, b"plain", 0)
    send_now(left, Bundle(b"next", [null]), 0)
    assert read(right, False) == b"plain"
    assert received(read(right, False)) == (b"next", 1)


@pytest.mark.parametrize("count", [1, 300])
def test_at_the_limit_the_socket_remembers(pair: Pair, null: int, count: int, read: Read) -> None:
    left, right = pair
    Outgoing(Bundle(b"data", [null] * count)).push(left)
    send_now(left, b"next", 0)
    with descriptor_limit_reached():
        for _ in range(2):
            with pytest.raises(DescriptorLimit):
                read(right, marked(right))
    assert marked(right)
    assert received(read(right, True)) == (b"data", count)
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


def test_without_its_descriptors(pair: Pair, null: int, read: Read) -> None:
    left, right = pair
    send_now(left, Bundle(b"data", [null]), 0)
    send_now(left, b"next", 0)
    with descriptor_limit_reached(), pytest.raises(DescriptorLimit):
        read(right, False)
    assert read_without(right) == b"data"
    assert read(right, marked(right)) == b"next"


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


def test_lengths_above_two_gigabytes_have_eight_bytes(pair: Pair, read: Read) -> None:
    left, right = pair
    left.send(struct.pack("!iQ", -1, 5) + b"large")
    assert read(right, False) == b"large"
    left.send(struct.pack("!iQ", -1, 5) + b"large")
    assert read_bytes(right, False, None) == b"large"


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


def test_a_box_holds_its_contents_until_sent(pair: Pair, read: Read) -> None:
    left, right = pair
    reader, writer = os.pipe()
    message = Outgoing(Bundle(b"data", [writer] * 600))
    os.close(writer)
    message.own()  # nothing to duplicate: the kernel has them
    message.push(left)
    bundle = read(right, False)
    assert isinstance(bundle, Bundle)
    assert len({identity(copy) for copy in bundle.owned or ()}) == 1
    close_all(bundle.owned or ())
    assert os.read(reader, 1) == b""
    os.close(reader)
