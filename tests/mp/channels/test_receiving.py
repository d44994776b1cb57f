"""Messages that come in pieces, at the limit, at the end, or are not what was announced."""

from __future__ import annotations

import os
import pickle
import signal
import socket
from itertools import pairwise

import pytest
from kernel.pairs import Refusing, make_zero  # noqa: F401

from fdshare.errors import DescriptorLimit, DescriptorRefused, InvalidArgument, ProtocolError
from fdshare.kernel.ancillary import MAX_DESCRIPTORS, send_message
from fdshare.mp.channels.framing import LENGTH, framed, headed
from fdshare.mp.channels.incoming import Incoming
from fdshare.mp.channels.receiving import MessageReceiver
from fdshare.mp.channels.sending import Outgoing
from fdshare.mp.pickling.bundle import Bundle
from mp.common import (
    Pair,
    Read,
    descriptor_limit_reached,
    expecting_or_not,
    open_now,
    read_expecting,
    read_message,
    received,
    send,
    take,
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
    assert received(read(right)) == (b"data" * 10, 1)
    os.waitpid(pid, 0)


@expecting_or_not
@pytest.mark.parametrize("count", [1, 300])
def test_at_the_limit_nothing_is_lost(pair: Pair, null: int, count: int, read: Read) -> None:
    left, right = pair
    send(left, Bundle(b"data", [null] * count))
    send(left, b"next")
    with descriptor_limit_reached():
        for _ in range(2):
            with pytest.raises(DescriptorLimit):
                read(right)
    # Where the announcement could not be looked at beside the body, the socket remembers it.
    assert Incoming(right, False)._marked == (read is read_message or count > MAX_DESCRIPTORS)
    assert received(read(right)) == (b"data", count)
    assert not Incoming(right, False)._marked
    assert read(right) == b"next"


@expecting_or_not
@pytest.mark.parametrize("count", [1, 3])
def test_what_a_security_module_refuses_is_taken_once(
    pair: Pair, null: int, zero: int, count: int, read: Read
) -> None:
    """The message comes without its descriptors, and says why when it is opened."""
    left, right = pair
    for data in (b"data", b"more"):
        send(left, Bundle(data, [null] * (count - 1) + [zero]))
    send(left, b"next")
    before = open_now()
    with Refusing(right) as refusing:
        for data in (b"data", b"more"):
            message = read(refusing)
            assert open_now() == before + 1
            assert message.data == data
            with pytest.raises(DescriptorRefused):
                message.load(pickle.loads)
        assert read(refusing) == b"next"
    assert not Incoming(right, False)._marked


def test_a_message_at_once_that_is_refused(pair: Pair, zero: int) -> None:
    """Announcement and body were one send, and are read apart."""
    left, right = pair
    announcement, body = framed(b"data", 1)
    send_message(left, [announcement, body], [zero])
    send(left, b"next")
    with Refusing(right) as refusing:
        message = read_expecting(refusing)
        with pytest.raises(DescriptorRefused):
            message.load(pickle.loads)
        assert read_expecting(refusing) == b"next"


def test_a_refusal_that_did_not_last_leaves_the_message(pair: Pair, zero: int) -> None:
    left, right = pair
    send(left, Bundle(b"data", [zero]))
    with Refusing(right, times=1) as refusing:
        with pytest.raises(DescriptorLimit):
            read_message(refusing)
        assert received(read_message(refusing)) == (b"data", 1)


def test_what_a_plain_message_is_before_stays(pair: Pair, null: int) -> None:
    left, right = pair
    send(left, b"plain")
    send(left, Bundle(b"data", [null]))
    before = open_now()
    assert read_expecting(right) == b"plain"
    assert open_now() == before
    assert received(read_expecting(right)) == (b"data", 1)


@expecting_or_not
def test_what_another_left_is_not_taken_for_a_message(pair: Pair, null: int, read: Read) -> None:
    left, right = pair
    send(left, Bundle(b"data", [null]))
    other = MessageReceiver(right, True, None)
    with descriptor_limit_reached(), pytest.raises(DescriptorLimit):
        other.fetch()
    assert received(read(right)) == (b"data", 1)
    send(left, b"next")
    assert take(other) == b"next"


@expecting_or_not
@pytest.mark.parametrize("following", [0, 1])
def test_an_announcement_that_no_body_follows_is_void(
    pair: Pair, null: int, following: int, read: Read
) -> None:
    left, right = pair
    announcement, _ = framed(b"never", 1)
    for _ in range(2):
        left.send(announcement)
    send(left, Bundle(b"plain"))
    left.send(announcement)
    send(left, Bundle(b"data", [null] * following))
    before = open_now()
    assert read(right) == b"plain"
    assert open_now() == before
    assert received(read(right)) == (b"data", following)
    left.send(announcement)
    left.close()
    with pytest.raises(EOFError):
        read(right)


def test_who_waits_for_a_time_is_told_of_a_void_announcement(pair: Pair) -> None:
    left, right = pair
    left.send(framed(b"never", 1)[0])
    receiver = MessageReceiver(right, False, None)
    right.setblocking(False)
    with pytest.raises(BlockingIOError):
        receiver.fetch()
    left.send(headed(b"next"))
    receiver.fetch()
    assert receiver.message is None
    assert take(receiver) == b"next"


@expecting_or_not
def test_without_its_descriptors(pair: Pair, null: int, read: Read) -> None:
    left, right = pair
    send(left, Bundle(b"data", [null]))
    send(left, b"next")
    with descriptor_limit_reached(), pytest.raises(DescriptorLimit):
        read(right)
    assert MessageReceiver(right, False, None).receive_without() == b"data"
    receiver = MessageReceiver(right, False, None)
    assert receiver.receive_without() is None
    assert take(receiver) == b"next"


@expecting_or_not
def test_bytes_only(pair: Pair, null: int, read: Read) -> None:
    left, right = pair
    receiver = MessageReceiver(right, False, None)
    send(left, b"12345")
    assert receiver.receive_bytes(5) == b"12345"
    send(left, Bundle(b"data", [null]))
    for _ in range(2):
        with pytest.raises(InvalidArgument):
            receiver.receive_bytes(None)
    assert received(read(right)) == (b"data", 1)
    send(left, b"123456")
    assert MessageReceiver(right, False, None).receive_bytes(5) is None
    assert right.recv(99) == b"123456"


@pytest.mark.parametrize("data", [b"x", b"x" * 10, b"y" * 100_000])
def test_what_was_read_of_a_message_is_kept(pair: Pair, data: bytes) -> None:
    left, right = pair
    left.setblocking(False)
    right.setblocking(False)
    receiver = MessageReceiver(right, False, None)
    stream = LENGTH.pack(len(data)) + data
    cuts = sorted({0, 1, 3, 4, len(stream) // 2, len(stream)})
    for start, end in pairwise(cuts):
        with pytest.raises(BlockingIOError):
            receiver.fetch()
        left.send(stream[start:end])
    assert take(receiver) == data
    assert not receiver.parts


@pytest.mark.parametrize("count", [1, 300])
def test_what_was_read_of_a_body_is_kept(pair: Pair, null: int, count: int) -> None:
    left, right = pair
    right.setblocking(False)
    message = Outgoing(Bundle(b"x" * 1_000_000, [null] * count))
    receiver = MessageReceiver(right, False, None)
    before = open_now()
    while not message.push_now(left):
        with pytest.raises(BlockingIOError):
            receiver.fetch()
    assert received(take(receiver)) == (b"x" * 1_000_000, count)
    assert open_now() <= before  # less the boxes


@pytest.mark.parametrize("same", [True, False])
def test_an_announcement_whose_rest_is_read_after_an_exception(
    pair: Pair, null: int, same: bool
) -> None:
    """Of a socket that several read: whoever is next knows that a body follows."""
    left, right = pair
    announcement, body = framed(b"data", 1)

    def handle(*_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, lambda *_: None)  # another may have come by now
        left.send(announcement[2:])
        raise KeyboardInterrupt

    receiver = MessageReceiver(right, True, None)
    former = signal.signal(signal.SIGALRM, handle)
    try:
        left.send(announcement[:2])
        # Again and again: one signal may come just before recv(2) waits.
        signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
        with pytest.raises(KeyboardInterrupt):
            receiver.fetch()
    finally:
        signal.signal(signal.SIGALRM, former)
    send_message(left, [body], [null])
    following = receiver if same else MessageReceiver(right, True, None)
    assert received(take(following)) == (b"data", 1)


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
        read(right)
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
                read(right)
        else:
            assert received(read(right)) == (b"data", 1)
        assert open_now() == before
