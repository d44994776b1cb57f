"""closing: descriptors are closed, whatever one of the closes does."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from breaking import lingering_pair, reset
from conftest import wait_until

from fdshare.server.loop.closing import Closer, Handle, close_quietly


@pytest.fixture
def closer() -> Iterator[Closer]:
    closer = Closer()
    yield closer
    closer.stop(timeout=20)


def is_open(fd: int) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")


def closed_soon(closer: Closer, fd: int) -> None:
    closer.close(fd)
    wait_until(lambda: not is_open(fd), f"{fd} is closed")


def test_a_close_that_fails_is_no_obstacle(closer: Closer, null: int) -> None:
    closer.close(1 << 20)
    closed_soon(closer, os.dup(null))
    assert len(closer._threads) == 1


def test_a_close_that_hangs_holds_up_no_other(closer: Closer, null: int) -> None:
    sock, peer = lingering_pair(60)
    try:
        closer.close(sock.detach())
        wait_until(closer._is_stuck, "the close hangs")
        closed_soon(closer, os.dup(null))
        closed_soon(closer, os.dup(null))
        assert len(closer._threads) == 2
    finally:
        reset(peer)


def test_a_close_that_has_just_begun_to_hang_holds_up_no_other(closer: Closer, null: int) -> None:
    """Nobody else calls."""
    sock, peer = lingering_pair(60)
    try:
        closer.close(sock.detach())
        wait_until(lambda: closer._since, "the close has begun")
        closed_soon(closer, os.dup(null))
    finally:
        reset(peer)


def test_the_end_does_not_wait_for_one_that_hangs(null: int) -> None:
    closer = Closer()
    sock, peer = lingering_pair(60)
    try:
        closer.close(sock.detach())
        (thread,) = closer._threads
        closer.stop(timeout=0.01)
        assert thread.is_alive()
    finally:
        reset(peer)
    thread.join(20)
    assert not thread.is_alive()


def test_the_end_waits_for_what_was_asked_for(closer: Closer, null: int) -> None:
    fds = [os.dup(null) for _ in range(100)]
    for fd in fds:
        closer.close(fd)
    closer.stop(timeout=20)
    assert not any(map(is_open, fds))


def test_quietly_means_all_of_them() -> None:
    closed = []

    class Owner:
        def close(self) -> None:
            closed.append(self)
            raise OSError("the disk is full")

    close_quietly(Owner(), Owner())
    assert len(closed) == 2


def test_a_handle_says_what_becomes_of_it() -> None:
    handle = Handle(7)
    assert repr(handle) == "<Handle fd=7>"
    handle.closing = True
    assert repr(handle) == "<Handle fd=7 closing>"
