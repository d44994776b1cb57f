"""Forks while a thread is in the middle of a message: only the parent goes on with it."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeAlias

import pytest
from conftest import wait_until

from fdshare import get_context
from fdshare.mp.channels.framing import headed
from fdshare.mp.channels.sending import Outgoing
from fdshare.mp.pickling.reducers import encode
from mp.common import PACKAGES, ends, identity, trackers, writable  # noqa: F401
from mp.interrupts import SIGNAL, Interrupt, handled_by, interrupt

LONG = b"x" * 250_000  # more than a socket holds, and not laid into memory

# Runs a function in a child, and returns what waits for its end.
Fork: TypeAlias = Callable[[Callable[[], object]], Callable[[], object]]


def os_fork(function: Callable[[], object]) -> Callable[[], None]:
    def join() -> None:
        assert os.waitpid(pid, 0)[1] == 0

    pid = os.fork()
    if pid == 0:
        with suppress(BaseException):
            function()
            os._exit(0)
        os._exit(1)
    return join


def process(function: Callable[[], object]) -> Callable[[], None]:
    def join() -> None:
        child.join()
        assert child.exitcode == 0

    child = get_context("fork").Process(target=function)
    child.start()
    return join


@pytest.fixture(params=[os_fork, process])
def fork(request: pytest.FixtureRequest) -> Fork:
    result: Fork = request.param
    return result


@pytest.fixture(params=PACKAGES)
def ctx(request: pytest.FixtureRequest) -> Any:
    return get_context("fork", backend=request.param)


def in_thread(function: Callable[..., object], *args: object) -> threading.Thread:
    thread = threading.Thread(target=function, args=args, daemon=True)
    thread.start()
    return thread


def has_begun(writer: Any) -> bool:
    """Whether a thread is in the middle of a message."""
    return writer._sender is not None and writer._sender.begun and not writable(writer)


def close_in_child(ctx: Any, fork: Fork) -> None:
    reader, writer = ctx.Pipe(duplex=False)
    near, far = socket.socketpair()
    thread = in_thread(writer.send_bytes, LONG)
    wait_until(lambda: not writable(writer))
    join = fork(lambda: (far.recv(1), writer.close()))
    assert reader.recv_bytes() == LONG
    thread.join()
    near.send(b"1")
    join()
    assert not reader.poll()


def test_a_child_that_closes_sends_nothing_again(ctx: Any, fork: Fork) -> None:
    ends(close_in_child, ctx, fork)


def send_in_child(ctx: Any, fork: Fork) -> None:
    reader, writer = ctx.Pipe(duplex=False)
    near, far = socket.socketpair()
    thread = in_thread(writer.send, [near, LONG])
    wait_until(lambda: has_begun(writer))
    join = fork(lambda: (far.recv(1), writer.send_bytes(b"the child's")))
    assert reader.recv()[1] == LONG
    thread.join()
    near.send(b"1")
    join()
    assert reader._carrier().recv(100) == headed(b"the child's")


def test_a_child_that_sends_does_not_go_on_with_what_has_begun(ctx: Any, fork: Fork) -> None:
    ends(send_in_child, ctx, fork)


def put_in_child(ctx: Any, fork: Fork) -> None:
    queue = ctx.SimpleQueue()
    with socket.socket() as sock:
        thread = in_thread(queue.put, [sock, LONG])
        wait_until(lambda: has_begun(queue._writer))
        join = fork(lambda: queue.put("the child's"))
        assert queue.get()[1] == LONG
        thread.join()
        join()
    assert queue.get() == "the child's"


def test_a_child_that_puts_waits_for_the_thread(ctx: Any, fork: Fork) -> None:
    ends(put_in_child, ctx, fork)


def copies_of(sock: socket.socket) -> int:
    """How many descriptors this process has of *sock*."""
    found = 0
    for number in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            status = os.stat(int(number))
            found += (status.st_dev, status.st_ino) == identity(sock)
    return found


def get_in_child(ctx: Any, fork: Fork) -> None:
    def get() -> None:
        assert copies_of(sock) == 1
        assert queue.get() == "the child's"

    queue = ctx.SimpleQueue()
    carrier = queue._writer._carrier()
    with socket.socket() as sock:
        rest = Outgoing(encode(ctx._family, [sock, LONG]))
        with suppress(BlockingIOError):
            rest.push(carrier, socket.MSG_DONTWAIT)
        assert rest.begun
        thread = in_thread(queue.get)
        wait_until(lambda: not queue._reader.poll() and queue._reader._receiver.parts)
        assert copies_of(sock) == 2
        join = fork(get)
        rest.push(carrier)
        thread.join()
        queue.put("the child's")
        join()


def test_a_child_that_gets_does_not_go_on_with_what_a_thread_gets(ctx: Any, fork: Fork) -> None:
    ends(get_in_child, ctx, fork)


def put_after_interrupt(ctx: Any, fork: Fork) -> None:
    def interrupt_put() -> None:
        wait_until(lambda: not writable(queue._writer))
        signal.pthread_kill(threading.main_thread().ident or 0, SIGNAL)

    queue = ctx.SimpleQueue()
    in_thread(interrupt_put)
    with handled_by(interrupt), pytest.raises(Interrupt):
        queue.put(LONG)
    join = fork(lambda: queue.put("the child's"))
    assert queue.get() == LONG
    join()
    assert queue.get() == "the child's"


def test_a_child_does_not_wait_for_a_thread_that_it_has_not(ctx: Any, fork: Fork) -> None:
    ends(put_after_interrupt, ctx, fork)
