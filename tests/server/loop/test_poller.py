"""poller: keys, not numbers; with epoll, and with poll where there is none."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Iterator

import pytest

from fdshare.server.loop.poller import HANGUP, READ, WRITE, Poller

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture(params=["epoll", "poll"])
def poller(request: pytest.FixtureRequest) -> Iterator[Poller]:
    poller = Poller()
    if request.param == "poll":  # as on a system that has nothing else
        poller.close()
        poller._epoll, poller._poll = None, select.poll()
    yield poller
    poller.close()


def test_keys_are_reported_as_long_as_they_are_ready(poller: Poller, pair: Pair) -> None:
    near, far = pair
    poller.register(near.fileno(), READ, "near")
    assert poller.wait(0) == []
    far.send(b"x")
    assert poller.wait(None) == poller.wait(0) == [("near", READ)]
    near.recv(1)
    assert poller.wait(0) == []


def test_what_is_asked_for_can_change(poller: Poller, pair: Pair) -> None:
    near, far = pair
    far.send(b"x")
    poller.register(near.fileno(), READ | WRITE, "near")
    assert poller.wait(0) == [("near", READ | WRITE)]
    poller.modify(near.fileno(), WRITE)
    assert poller.wait(0) == [("near", WRITE)]


def test_a_number_that_is_used_again_has_another_key(poller: Poller, pair: Pair) -> None:
    near, far = pair
    far.send(b"x")
    fd = os.dup(near.fileno())
    poller.register(fd, READ, "first")
    poller.unregister(fd)
    os.close(fd)
    assert os.dup(near.fileno()) == fd
    poller.register(fd, READ, "second")
    assert poller.wait(0) == [("second", READ)]
    poller.unregister(fd)
    os.close(fd)


def test_unregistering_twice_is_nothing(poller: Poller, pair: Pair) -> None:
    near, far = pair
    far.send(b"x")
    poller.register(near.fileno(), READ, "near")
    for _ in range(2):
        poller.unregister(near.fileno())
    assert poller.wait(0) == []


def test_the_end_of_a_peer_is_reported_where_it_was_asked_for(poller: Poller, pair: Pair) -> None:
    near, far = pair
    poller.register(near.fileno(), HANGUP, "near")
    assert poller.wait(0) == []
    far.shutdown(socket.SHUT_WR)
    ((key, events),) = poller.wait(0)
    assert key == "near"
    assert events & HANGUP


def test_more_than_one_wait_reports_are_all_reported(poller: Poller) -> None:
    """None starves: the rest comes first next time."""
    pipes = [os.pipe() for _ in range(50)]
    for number, (read, write) in enumerate(pipes):
        os.write(write, b"x")
        poller.register(read, READ, number)
    seen: set[object] = set()
    for _ in range(2):
        seen.update(key for key, _ in poller.wait(0))
    assert seen == set(range(50))
    for ends in pipes:
        poller.unregister(ends[0])
        for end in ends:
            os.close(end)


def test_a_wait_of_ages_ends_with_the_first_event(poller: Poller, pair: Pair) -> None:
    """epoll_wait(2) takes no more than 24 days."""
    near, far = pair
    poller.register(near.fileno(), READ, "near")
    far.send(b"x")
    for timeout in (1e300, float("inf"), 1e-9):
        assert poller.wait(timeout) == [("near", READ)]


def test_a_file_cannot_be_polled_by_epoll() -> None:
    poller = Poller()
    with open(__file__) as file, pytest.raises(PermissionError):
        poller.register(file.fileno(), READ, "file")
    assert poller.wait(0) == []
    poller.close()
