"""Sends on a connection that stop half-way, or come inside each other."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import pytest
from conftest import wait_until

import fdshare
from fdshare import get_context
from fdshare.mp.channels.framing import LENGTH, headed
from fdshare.mp.channels.receiving import MessageReceiver
from fdshare.mp.channels.sender import Sender
from fdshare.mp.channels.sending import Outgoing
from fdshare.mp.pickling.bundle import Bundle, Encoded
from mp.common import Pair, received, take

LARGE = b"x" * 1_000_000
PACKAGE = os.path.dirname(fdshare.__file__)


class GivenUp(Exception):
    pass


@pytest.fixture
def alarm() -> Iterator[Callable[[], None]]:
    """A handler raises a moment after the call of this, once a function of ours runs."""

    def handle(_: int, frame: FrameType | None) -> None:
        ours = False
        while frame is not None:
            if frame.f_code.co_name == "__del__":
                return  # what is raised in a finaliser is printed, and lost
            ours |= frame.f_code.co_filename.startswith(PACKAGE)
            frame = frame.f_back
        if not ours:
            return
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, lambda *_: None)  # another may have come by now
        raise GivenUp

    def start() -> None:
        signal.signal(signal.SIGALRM, handle)
        # Again and again: one signal may come just before sendmsg(2) waits.
        signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)

    former = signal.getsignal(signal.SIGALRM)
    yield start
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, former)


def fill(sock: socket.socket, message: bytes) -> int:
    """How many times *message*, framed, goes into *sock*."""
    count = 0
    try:
        while True:
            sock.send(headed(message), socket.MSG_DONTWAIT)
            count += 1
    except BlockingIOError:
        return count


def message_of(data: bytes, null: int, count: int | None) -> Encoded:
    """None: no bundle."""
    return data if count is None else Bundle(data, [null] * count)


@pytest.mark.parametrize("count", [None, 0, 1, 3, 300])
@pytest.mark.parametrize("size", [10, 1_000_000])
def test_what_is_given_up_comes_whole_or_not_at_all(
    pair: Pair, null: int, alarm: Callable[[], None], count: int | None, size: int
) -> None:
    left, right = pair
    sender, receiver = Sender(left), MessageReceiver(right, False, None)
    before = fill(left, b"before")
    alarm()
    with pytest.raises(GivenUp):
        sender.send(message_of(b"y" * size, null, count))
    for _ in range(before):
        assert take(receiver) == b"before"
    right.setblocking(False)
    with pytest.raises(BlockingIOError):  # nothing that a poll() would take for a message
        right.recv(1, socket.MSG_PEEK)
    sender.send(b"next")
    assert take(receiver) == b"next"


@pytest.mark.parametrize("count", [None, 0, 1, 3, 300])
def test_what_has_begun_goes_on_with_the_next(
    pair: Pair, null: int, alarm: Callable[[], None], count: int | None
) -> None:
    left, right = pair
    sender, receiver = Sender(left), MessageReceiver(right, False, None)
    while not sender.begun:  # on a machine at work the signal may come before the first system call
        alarm()
        with pytest.raises(GivenUp):
            sender.send(message_of(LARGE, null, count))
    left.setblocking(False)
    right.setblocking(False)
    while sender.waiting:
        with pytest.raises(BlockingIOError):
            receiver.fetch()
        sender._try_waiting()
    assert received(take(receiver)) == (LARGE, count or 0)


def test_a_program_may_make_it_non_blocking(pair: Pair, null: int) -> None:
    left, right = pair
    left.setblocking(False)
    sender, receiver = Sender(left), MessageReceiver(right, False, None)
    before = fill(left, b"before")
    for message in (
        b"small",
        (b"single", [null]),
        Bundle(b"several", [null] * 3),
        Bundle(LARGE),
        LARGE,
    ):
        with pytest.raises(BlockingIOError):
            sender.send(message)
        assert not sender.waiting
    for _ in range(before):
        assert take(receiver) == b"before"
    sender.send(b"after")
    assert take(receiver) == b"after"


def test_what_a_full_socket_took_is_gone_on_with(pair: Pair) -> None:
    left, right = pair
    left.setblocking(False)
    sender, receiver = Sender(left), MessageReceiver(right, False, None)
    with pytest.raises(BlockingIOError):
        sender.send(LARGE)
    assert sender.begun
    right.setblocking(False)
    with pytest.raises(BlockingIOError):
        receiver.fetch()
    left.setblocking(True)
    right.setblocking(True)
    writing = threading.Thread(target=sender.send, args=(b"next",), daemon=True)
    writing.start()
    assert take(receiver) == LARGE
    assert take(receiver) == b"next"
    writing.join(10)


def test_close_sends_what_takes_no_time(pair: Pair, alarm: Callable[[], None]) -> None:
    left, right = pair
    sender = Sender(left)
    alarm()
    with pytest.raises(GivenUp):
        sender.send(LARGE)
    got = right.recv(len(LARGE))
    while len(got) < len(LARGE) + 4:
        sender._try_waiting()
        got += right.recv(len(LARGE))
    sender.close()
    assert got == LENGTH.pack(len(LARGE)) + LARGE


def test_close_leaves_a_message_to_the_thread_that_sends_it(pair: Pair, null: int) -> None:
    def send() -> None:
        sender.send(Bundle(LARGE, [null]))
        sent.append(True)

    left, right = pair
    sender, receiver = Sender(left), MessageReceiver(right, False, None)
    sent: list[bool] = []
    sending = threading.Thread(target=send)
    sending.start()
    wait_until(lambda: sender.begun)
    sender.close()
    assert received(take(receiver)) == (LARGE, 1)
    sending.join()
    assert sent
    assert not sender.waiting


def test_close_does_not_send_what_was_refused(pair: Pair) -> None:
    """As after a second exception, which came before it was removed."""
    left, right = pair
    sender = Sender(left)
    sender.waiting.append(Outgoing(b"refused"))
    sender.close()
    left.close()
    assert right.recv(1) == b""


@pytest.mark.parametrize("count", [None, 1])
def test_an_inner_send_is_left_to_the_outer_one(
    pair: Pair, null: int, alarm: Callable[[], None], count: int | None
) -> None:
    left, right = pair
    sender, receiver = Sender(left), MessageReceiver(right, False, None)

    def handle(*_: object) -> None:
        sender.send(Bundle(b"inner", [null]))
        right.setblocking(False)
        while True:
            try:
                receiver.fetch()
            except BlockingIOError:
                break
            got.append(received(receiver.message or b""))
            receiver.message = None

    got: list[tuple[bytes, int]] = []
    signal.signal(signal.SIGALRM, handle)
    signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
    sender.send(message_of(LARGE, null, count))
    signal.setitimer(signal.ITIMER_REAL, 0)
    handle()
    handle()
    assert got[0] == (LARGE, count or 0)
    assert set(got[1:]) == {(b"inner", 1)}


def test_an_alarm_in_a_send_of_a_context(alarm: Callable[[], None]) -> None:
    reader, writer = get_context("fork").Pipe(duplex=False)
    with reader, writer, socket.socket() as sock:
        sent = 0
        alarm()
        with pytest.raises(GivenUp):
            while True:
                writer.send([sock, "x" * 100])
                sent += 1
        signal.setitimer(signal.ITIMER_REAL, 0)
        came = 0
        while reader.poll(0):
            reader.recv()[0].close()
            came += 1
        assert came in (sent, sent + 1)
        writer.send("stop")
        assert reader.recv() == "stop"
