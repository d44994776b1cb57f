"""What was read of a message stays, over exceptions and from one process to the next."""

from __future__ import annotations

import errno
import os
import signal
import socket

import pytest
from conftest import wait_until

from fdshare.errors import DescriptorLimit
from fdshare.mp.channels.framing import LENGTH
from fdshare.mp.channels.incoming import MARK, TORN, Incoming, TornMessage
from fdshare.mp.channels.receiving import MessageReceiver
from fdshare.mp.channels.sending import Outgoing
from fdshare.mp.pickling.bundle import Bundle
from mp.common import Pair, descriptor_limit_reached, send

BODY_OF_9 = LENGTH.pack(-3 - 9)


def test_it_is_filled_over_exceptions(pair: Pair) -> None:
    left, right = pair
    right.setblocking(False)
    incoming = Incoming(right, False)
    for piece in (b"\0\0", b"\0\x05hel"):
        with pytest.raises(BlockingIOError):
            incoming._read_head(0)
        left.send(piece)
    left.send(b"lo")
    assert not incoming._read_head(0)
    assert incoming.message == b"hello"
    assert incoming.parts == []


@pytest.mark.parametrize(("piece", "error"), [(b"", EOFError), (b"\0\0\0\x05he", OSError)])
def test_at_the_end_nothing_stays(pair: Pair, piece: bytes, error: type[Exception]) -> None:
    left, right = pair
    incoming = Incoming(right, False)
    left.send(piece)
    left.shutdown(socket.SHUT_WR)
    with pytest.raises(error):
        incoming._read_head(0)
    assert incoming.parts == []


def test_an_announcement_is_told_from_what_follows_it(pair: Pair) -> None:
    left, right = pair
    incoming = Incoming(right, False)
    left.send(BODY_OF_9)
    assert incoming._read_head(0)
    left.send(LENGTH.pack(5) + b"hello")  # it was void
    assert not incoming._look_at_body(0)
    assert not incoming._read_head(0)
    assert incoming.message == b"hello"


@pytest.mark.parametrize("count", [1, 253, 600])
def test_at_the_limit_the_body_stays(pair: Pair, null: int, count: int) -> None:
    left, right = pair
    incoming = Incoming(right, False)
    send(left, Bundle(b"data", [null] * count))
    assert incoming._read_head(0)
    with descriptor_limit_reached(), pytest.raises(DescriptorLimit):
        incoming._look_at_body(0)
    assert incoming._look_at_body(0)
    numbers = incoming._numbers()
    assert len(numbers) == count
    assert {os.fstat(number).st_rdev for number in numbers} == {os.fstat(null).st_rdev}
    incoming._drop()
    with pytest.raises(OSError) as caught:
        os.fstat(numbers[0])
    assert caught.value.errno == errno.EBADF


@pytest.mark.skipif(MARK is None, reason="no SO_PRIORITY here")
def test_another_reader_of_the_socket_knows_that_a_body_is_next(pair: Pair, null: int) -> None:
    left, right = pair
    Outgoing(Bundle(b"data", [null])).push(left)
    incoming, other = Incoming(right, True), Incoming(right, True)
    assert incoming._read_head(0)
    other._recall()
    assert other._size is None
    incoming._mark()
    other._recall()
    assert other._size is not None
    assert other._look_at_body(0)
    other._unmark()
    other._drop()
    third = Incoming(right, False)
    assert third._size is None


def test_after_a_reader_that_was_killed_nothing_is_taken_for_a_message(pair: Pair) -> None:
    left, right = pair
    size = 1 << 17
    left.send(LENGTH.pack(size) + bytes(size // 2))
    killed = os.fork()
    if not killed:
        MessageReceiver(right, True, None).fetch()
        os._exit(1)
    wait_until(lambda: right.getsockopt(socket.SOL_SOCKET, MARK) == TORN)
    os.kill(killed, signal.SIGKILL)
    os.waitpid(killed, 0)
    left.send(LENGTH.pack(5) + b"hello")  # data of the program, which looks like a message
    for _ in range(2):
        with pytest.raises(TornMessage):
            MessageReceiver(right, True, None).fetch()


def test_a_long_message_that_was_read_leaves_no_mark(pair: Pair, null: int) -> None:
    left, right = pair
    receiver = MessageReceiver(right, True, None)
    for message in (b"x" * 50_000, Bundle(b"y" * 50_000, [null])):
        send(left, message)
        receiver.fetch()
        assert receiver.message is not None
        assert right.getsockopt(socket.SOL_SOCKET, MARK) == 0
        if isinstance(receiver.message, Bundle):
            receiver.message.close()
        receiver.message = None
