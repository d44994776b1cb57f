"""A signal's handler that runs between any two instructions of a channel: it raises, or sends.

An interrupt comes before every STEP-th instruction of a call, or before each
(FDSHARE_CHAOS=long), until the call is over before it comes. Where locks or pickles are others, by
the start method or the package, fewer of them do.
"""

from __future__ import annotations

import gc
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pickle import PickleBuffer
from typing import Any, Final

import pytest
from conftest import wait_until

from fdshare import ProcessPoolExecutor, get_context
from mp import children
from mp.common import finish, identity, open_now, trackers  # noqa: F401
from mp.interrupts import (  # noqa: F401
    Interrupt,
    Interrupter,
    handled_by,
    interrupt,
    make_interrupter,
)

# Python's own way with an exception in a finaliser: it is dropped, and said to be.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

STEP = 1 if os.environ.get("FDSHARE_CHAOS") == "long" else 13
FEWER = 7

NAMES = ("Queue", "JoinableQueue", "SimpleQueue", "Pipe")
CHANNELS = [("multiprocessing", "fork", name) for name in NAMES]
OTHERS = [
    ("multiprocessing", "spawn", "Queue"),
    ("multiprocessing", "forkserver", "SimpleQueue"),
    ("multiprocess", "fork", "JoinableQueue"),
    ("multiprocess", "spawn", "Pipe"),
]


class Channel:
    """A queue or a pipe, with the same words for both."""

    def __init__(self, package: str, method: str, name: str) -> None:
        ctx = get_context(method, backend=package)
        self.step = STEP * (FEWER if (package, method, name) in OTHERS else 1)
        self.queue = None if name == "Pipe" else getattr(ctx, name)()
        if self.queue is None:
            self.reader, self.writer = ctx.Pipe(duplex=False)
            self.put, self.get = self.writer.send, self.reader.recv
        else:
            self.put, self.get = self.queue.put, self.queue.get
        self.put("first")
        self.get()

    def close(self) -> None:
        if self.queue is None:
            self.reader.close()
            self.writer.close()
        else:
            finish(self.queue)

    def open_now(self) -> int:
        """How many descriptors this process has, but for memory that is kept for later messages."""
        writer = self.writer if self.queue is None else self.queue._writer
        return open_now() - sum(kept.is_open for kept in writer._cache._kept)

    def settle(self) -> None:
        """Fails if a bounded queue has not all its places, or counts what is not there."""
        if hasattr(self.queue, "_sem"):
            assert self.queue._sem._semlock._get_value() == self.queue._maxsize
        if hasattr(self.queue, "task_done"):
            while self.queue._unfinished_tasks._semlock._get_value():
                self.queue.task_done()


@pytest.fixture(params=CHANNELS + OTHERS, ids="-".join)
def channel(request: pytest.FixtureRequest) -> Iterator[Channel]:
    channel = Channel(*request.param)
    yield channel
    channel.close()


# Lower than in use: it is copied for each instruction of a test.
LARGE: Final = 1 << 17


class Memory:
    """Its numbers travel in a memfd."""

    def __init__(self, numbers: Any) -> None:
        self.numbers = bytes(numbers)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Memory) and self.numbers == other.numbers

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Memory, (PickleBuffer(self.numbers),)


@pytest.fixture(params=["number", "socket", "list", "large", "large with a socket", "memory"])
def item(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr("fdshare.mp.pickling.large.LARGE", LARGE)
    with socket.socket() as sock, socket.socket() as other:
        yield {
            "number": 5,
            "socket": sock,
            "list": [sock, other],
            "large": b"x" * 100_000,
            "large with a socket": [sock, b"x" * 50_000],
            "memory": Memory(bytes(LARGE)),
        }[request.param]


def sockets(item: Any) -> list[socket.socket]:
    found = item if isinstance(item, list) else [item]
    return [one for one in found if isinstance(one, socket.socket)]


def check(arrived: Any, item: Any) -> None:
    """Fails unless *arrived* is *item*, and closes it."""
    assert type(arrived) is type(item)
    assert list(map(identity, sockets(arrived))) == list(map(identity, sockets(item)))
    if not sockets(item):
        assert arrived == item
    for sock in sockets(arrived):
        sock.close()


def until(get: Callable[[], Any], end: Any) -> list[Any]:
    """What comes before *end*."""
    found: list[Any] = []
    while (one := get()) != end:
        found.append(one)
    return found


def test_put_is_done_or_not_done(channel: Channel, item: Any, interrupter: Interrupter) -> None:
    before, instructions, over = channel.open_now(), 1, False
    while not over:
        with handled_by(interrupt) as came, suppress(Interrupt):
            over = not interrupter.arrives(instructions, lambda: channel.put(item))
        channel.put(("end", instructions))
        arrived = until(channel.get, ("end", instructions))
        assert len(arrived) <= 1 if came else len(arrived) == 1
        for one in arrived:
            check(one, item)
        channel.settle()
        gc.collect(0)
        assert channel.open_now() == before
        instructions += channel.step


@pytest.mark.parametrize("expecting", [False, True], ids=["", "expecting"])
def test_get_leaves_the_next_message_whole(
    channel: Channel, item: Any, expecting: bool, interrupter: Interrupter
) -> None:
    before, instructions, over, lost = channel.open_now(), 1, False, 0
    while not over:
        for _ in range(3 * expecting):  # messages with descriptors are peeked at then
            channel.put(item)
            check(channel.get(), item)
        channel.put(item)
        channel.put(("end", instructions))
        got: list[Any] = []
        with handled_by(interrupt) as came, suppress(Interrupt):
            # What it returns is in the list before anything can come in between.
            get = lambda: got.extend(map(CALL, (channel.get,)))  # noqa: E731, B023
            over = not interrupter.arrives(instructions, get)
        got += until(channel.get, ("end", instructions))
        lost += not got
        assert len(got) == 1 or (came and not got)
        for one in got:
            check(one, item)
        got.clear()
        channel.settle()
        gc.collect(0)
        assert channel.open_now() == before
        instructions += channel.step
    # An object is lost while it is unpickled by Python code, and then its descriptors are closed.
    assert not lost or isinstance(item, list | Memory)


def CALL(function: Callable[[], Any]) -> Any:
    return function()


@pytest.mark.parametrize("nested", ["number", "socket"])
def test_put_may_be_called_during_put(
    channel: Channel, item: Any, nested: str, interrupter: Interrupter
) -> None:
    with socket.socket() as sock:
        inner = ("inner", 5 if nested == "number" else sock)
        before, instructions, over = channel.open_now(), 1, False
        while not over:
            came: list[int] = []

            def put() -> None:
                came.append(1)  # noqa: B023
                channel.put(inner)

            with handled_by(put):
                over = not interrupter.arrives(instructions, lambda: channel.put(item))
            arrived = [channel.get() for _ in range(1 + len(came))]
            inners = [one for one in arrived if isinstance(one, tuple)]
            assert len(inners) == len(came)
            for one in arrived:
                check(one[1] if one in inners else one, inner[1] if one in inners else item)
            channel.settle()
            instructions += channel.step
    gc.collect()
    assert channel.open_now() <= before


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="a `with` may leave its lock locked")
def test_an_executor_goes_on_after_a_submit(interrupter: Interrupter) -> None:
    """The lock of the ids stayed locked, or an id was used twice."""
    with ProcessPoolExecutor(1, get_context("fork")) as executor:
        executor.submit(children.same, 0).result(60)
        submit = lambda: executor.submit(children.same, "interrupted")  # noqa: E731
        instructions, over = 1, False
        while not over:
            with handled_by(interrupt), suppress(Interrupt):
                over = not interrupter.arrives(instructions, submit)
            assert executor.submit(children.same, instructions).result(60) == instructions
            wait_until(lambda: not executor._pending_work_items, "the end of all calls")
            instructions += 1
