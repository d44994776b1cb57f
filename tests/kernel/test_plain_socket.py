"""Sockets that a program's default timeout does not reach. The kernel is asked (O_NONBLOCK)."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress

import pytest
from mp.interrupts import Interrupt, Interrupter, handled_by, interrupt, make_interrupter  # noqa: F401

from fdshare.kernel.descriptor import Descriptor
from fdshare.kernel.plain_socket import socket_of, stream_pair, view_of


@pytest.fixture(params=[None, 10.0, 0.0], autouse=True)
def default(request: pytest.FixtureRequest) -> Iterator[None]:
    former = socket.getdefaulttimeout()
    socket.setdefaulttimeout(request.param)
    yield
    socket.setdefaulttimeout(former)


@pytest.fixture(params=[socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET])
def number(request: pytest.FixtureRequest) -> Iterator[int]:
    """A descriptor that blocks."""
    left, right = socket.socketpair(socket.AF_UNIX, request.param)
    left.settimeout(None)
    with left, right:
        yield left.fileno()


def test_a_pair_blocks() -> None:
    left, right = stream_pair()
    with left, right:
        assert left.gettimeout() is right.gettimeout() is None
        assert os.get_blocking(left.fileno())
        assert os.get_blocking(right.fileno())
        assert left.type == socket.SOCK_STREAM


def test_one_with_the_number_of_a_standard_stream_gets_another() -> None:
    code = """
import os, socket
from fdshare.kernel.plain_socket import above_standard
os.closerange(1, 3)
near, far = socket.socketpair()
numbers = near.fileno(), far.fileno()
moved = above_standard(near), above_standard(far)
both = socket.socketpair()
moved[0].send(b"x")
free = near.fileno() == far.fileno() == -1 and both[0].fileno() == 1
known = moved[1].recv(1) == b"x" and above_standard(moved[0]) is moved[0]
above = all(sock.fileno() > 2 and not sock.get_inheritable() for sock in moved)
os._exit(0 if numbers == (1, 2) and free and known and above else 1)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_a_view_leaves_the_description_as_it_is(number: int) -> None:
    for blocks in (True, False):
        os.set_blocking(number, blocks)
        view = view_of(number)
        try:
            assert os.get_blocking(number) is blocks
            assert view.family == socket.AF_UNIX
            assert view.type == view.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE)
        finally:
            view.detach()


def test_a_socket_of_a_blocking_description_has_no_timeout(number: int) -> None:
    sock = socket_of(os.dup(number))
    with sock:
        assert sock.gettimeout() is None
        assert os.get_blocking(number)
    with Descriptor.dup_of(number).socket() as sock:
        assert sock.gettimeout() is None


def test_what_is_no_socket_is_refused_and_stays_open() -> None:
    with Descriptor(os.open(os.devnull, os.O_RDONLY)) as null:
        with pytest.raises(OSError) as refused:
            socket_of(null.fileno())
        assert refused.value.errno == errno.ENOTSOCK
        os.fstat(null.fileno())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_number_is_its_callers_if_a_handler_raises(number: int, interrupter: Interrupter) -> None:
    made: list[socket.socket] = []
    instructions, over = 1, False
    while not over:
        copy = os.dup(number)
        with handled_by(interrupt), suppress(Interrupt):
            over = not interrupter.arrives(
                instructions,
                lambda: made.extend(map(socket_of, (copy,))),  # noqa: B023
            )
        while made:
            made.pop().detach()
        os.close(copy)  # it is open
        instructions += 1
