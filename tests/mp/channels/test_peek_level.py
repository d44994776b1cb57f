"""Readers of a queue that peek first, and senders that send both parts at once because of it."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdshare import get_context
from fdshare.errors import DescriptorLimit, InvalidArgument
from fdshare.mp.channels.peek_level import AT_ONCE
from mp import children
from mp.common import descriptor_limit_reached, dismiss, finish, identity, trackers  # noqa: F401

CTX = get_context("fork")
PLAIN = 8  # messages


@pytest.fixture
def sock() -> Iterator[socket.socket]:
    with socket.socket() as sock:
        yield sock


@pytest.fixture
def queue() -> Iterator[Any]:
    queue = CTX.Queue()
    yield queue
    finish(queue)


def level(queue: Any) -> int:
    value: int = queue._peek_semaphore._semlock._get_value()
    return value


def pass_on(queue: Any, sock: socket.socket, count: int) -> None:
    """*count* times through the queue and back."""
    for _ in range(count):
        queue.put(sock)
        with queue.get() as arrived:
            assert identity(arrived) == identity(sock)


def sends(queue: Any) -> list[int]:
    """From now on, how many bytes each send of the queue took."""
    sizes: list[int] = []

    class Counting:
        def __init__(self, sock: socket.socket) -> None:
            self.sock = sock

        def send(self, *args: Any) -> int:
            sizes.append(self.sock.send(*args))
            return sizes[-1]

        def sendmsg(self, *args: Any) -> int:
            sizes.append(self.sock.sendmsg(*args))
            return sizes[-1]

    queue._feeder._sock = Counting(queue._feeder._sock)
    return sizes


def test_several_in_a_row_are_sent_at_once(queue: Any, sock: socket.socket) -> None:
    pass_on(queue, sock, 1)
    sizes = sends(queue)
    assert level(queue) == 0
    pass_on(queue, sock, 1)
    assert len(sizes) == 2
    assert level(queue) == AT_ONCE
    pass_on(queue, sock, 1)
    assert len(sizes) == 3
    queue.put({"in": [sock, sock]})
    one, other = queue.get()["in"]
    assert one is other
    one.close()
    assert len(sizes) == 4
    assert sizes[2] == sizes[0] + sizes[1]


def test_numbers_alone_are_not_looked_at_for_long(queue: Any, sock: socket.socket) -> None:
    pass_on(queue, sock, 2)
    levels = []
    for number in range(3 * PLAIN):
        queue.put(number)
        assert queue.get() == number
        levels.append(level(queue))
    assert levels == [2] * (PLAIN - 1) + [1] * PLAIN + [0] * (PLAIN + 1)
    pass_on(queue, sock, 3)
    assert level(queue) == AT_ONCE


def test_it_is_looked_as_long_as_descriptors_wait(queue: Any, sock: socket.socket) -> None:
    pass_on(queue, sock, 2)
    for number in range(3 * PLAIN):
        queue.put(number)
    queue.put(sock)
    for number in range(3 * PLAIN):
        assert queue.get() == number
    assert level(queue) == 1
    queue.get().close()
    for number in range(PLAIN):
        queue.put(number)
        assert queue.get() == number
    assert level(queue) == 0


def test_it_is_looked_while_somebody_sends(queue: Any, sock: socket.socket) -> None:
    pass_on(queue, sock, 2)
    for number in range(3 * PLAIN):
        queue.put(number)
    with queue._wlock:
        for number in range(3 * PLAIN):
            assert queue.get() == number
    assert level(queue) == 1


def test_at_the_limit_all_of_it_stays(queue: Any, sock: socket.socket) -> None:
    pass_on(queue, sock, 2)
    queue.put(sock)
    queue.put("next")
    with descriptor_limit_reached():
        for _ in range(2):
            with pytest.raises(DescriptorLimit):
                queue.get()
    with queue.get() as arrived:
        assert identity(arrived) == identity(sock)
    assert queue.get() == "next"


def test_at_the_limit_numbers_before_it_arrive(queue: Any, sock: socket.socket) -> None:
    pass_on(queue, sock, 2)
    for number in range(3 * PLAIN):
        queue.put(number)
    queue.put(sock)
    with descriptor_limit_reached():
        for number in range(3 * PLAIN):
            assert queue.get() == number
        with pytest.raises(DescriptorLimit):
            queue.get()
    with queue.get() as arrived:
        assert identity(arrived) == identity(sock)


def test_what_was_left_can_be_let_go(queue: Any, sock: socket.socket) -> None:
    pass_on(queue, sock, 2)
    queue.put(sock)
    queue.put("next")
    with descriptor_limit_reached(), pytest.raises(DescriptorLimit):
        queue.get()
    queue._reader._discard()
    assert queue._reader.recv() == "next"


def test_bytes_only(queue: Any, sock: socket.socket) -> None:
    pass_on(queue, sock, 2)
    queue.put(sock)
    for _ in range(2):
        with pytest.raises(InvalidArgument, match="has descriptors"):
            queue._reader.recv_bytes()
    with queue._reader.recv() as arrived:
        assert identity(arrived) == identity(sock)
    queue._writer.send_bytes(b"data")
    assert queue._reader.recv_bytes() == b"data"
    queue._writer.send_bytes(bytes(1 << 17))
    assert queue._reader.recv_bytes() == bytes(1 << 17)


def test_a_full_queue(queue: Any, sock: socket.socket) -> None:
    pass_on(queue, sock, 2)
    for number in range(1000):
        queue.put(sock if number % 2 else number)
    for number in range(1000):
        if number % 2:
            with queue.get() as arrived:
                assert identity(arrived) == identity(sock)
        else:
            assert queue.get() == number


@given(st.lists(st.tuples(st.sampled_from(["number", "socket", "in a list"]), st.integers(1, 12))))
def test_whatever_comes_arrives(puts: list[tuple[str, int]]) -> None:
    queue = CTX.Queue()
    with socket.socket() as sock:
        items = {"number": 5, "socket": sock, "in a list": [sock]}
        waiting = []
        for what, count in puts:
            for number in range(count):
                queue.put(items[what])
                waiting.append(what)
                if number % 3:
                    check(queue, waiting.pop(0), sock)
        for what in waiting:
            check(queue, what, sock)
    finish(queue)


def check(queue: Any, what: str, sock: socket.socket) -> None:
    """That the next of *queue* is a *what*."""
    got = queue.get()
    if what == "number":
        assert got == 5
    else:
        with got if what == "socket" else got[0] as arrived:
            assert identity(arrived) == identity(sock)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_all_processes_know(method: str, sock: socket.socket) -> None:
    ctx = get_context(method)
    inbox, outbox = ctx.Queue(), ctx.Queue()
    workers = [ctx.Process(target=children.echo, args=(inbox, outbox)) for _ in range(3)]
    for worker in workers:
        worker.start()
    # Long enough runs of both, that what is known changes again and again while all of them read.
    turns = random.Random(5)
    sent = arrived = 0
    for _ in range(60):
        for item in [sock if turns.random() < 0.5 else 5] * turns.randrange(30):
            inbox.put((sent, item))
            sent += 1
            if sent - arrived > 50:
                arrived += receive(outbox, sock)
    while arrived < sent:
        arrived += receive(outbox, sock)
    dismiss(workers, inbox, outbox)


def receive(queue: Any, sock: socket.socket) -> int:
    _, item = queue.get(timeout=30)
    if item != 5:
        with item:
            assert identity(item) == identity(sock)
    return 1


def test_a_stopped_sender_is_waited_for(queue: Any, sock: socket.socket) -> None:
    """Who has seen that it may send at once, and is then held up, may still do so."""
    pass_on(queue, sock, 2)
    real = queue._feeder._level

    def held_up() -> int:
        value: int = real()
        for number in range(4 * PLAIN):  # another process's, that does not heed our lock
            os.write(queue._writer.fileno(), b"\0\0\0\5" + b"\x80\4K%c." % number)
            assert queue._reader.recv() == number
        return value

    queue._feeder._level = held_up
    queue.put(sock)
    with queue.get() as arrived:
        assert identity(arrived) == identity(sock)
    assert level(queue) == 1
