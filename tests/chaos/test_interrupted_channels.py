"""Signals at random moments whose handler raises, in both processes of every channel."""

from __future__ import annotations

import json
import random
import signal
import socket
import traceback
from collections.abc import Callable
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pytest
from conftest import wait_until
from mp.common import PACKAGES, finish, identity, open_now, trackers  # noqa: F401

from fdshare import get_context

# Python's own way with an exception in a finaliser: it is dropped, and said to be.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

CHANNELS = ("Queue", "JoinableQueue", "SimpleQueue", "Pipe")
SOCKETS = 101  # the same one comes again after enough others to tell by
SIZES = (0, 100, 20_000, 250_000)
_LONG = 300  # seconds, for a reader on a machine that does much else


class Interrupt(BaseException):
    """What the handler raises."""


class Alarms:
    """Raises at random moments, so many times."""

    def __init__(self, seed: int, count: int) -> None:
        self.left = count
        self.armed = False
        self._random = random.Random(seed)

    def during(self, function: Callable[[], object]) -> None:
        """Calls *function*; one may come until it is over, and ends it."""
        try:
            signal.setitimer(signal.ITIMER_REAL, self._random.uniform(1e-6, 2e-4))
            self.armed = True
            function()
            self.armed = False
        except Interrupt:
            self.left -= 1
        signal.setitimer(signal.ITIMER_REAL, 0)

    def handle(self, *_: object) -> None:
        """The handler."""
        if self.armed:
            self.armed = False
            raise Interrupt


def message(number: int, sockets: list[socket.socket]) -> Any:
    match number % 3:
        case 0:
            return number
        case 1:
            return sockets[number % SOCKETS]
    return [number, b"x" * SIZES[number // 3 % len(SIZES)]]


def name_of(arrived: Any) -> Any:
    """What tells it from those before and after it."""
    return list(identity(arrived)) if isinstance(arrived, socket.socket) else arrived


def write(put: Callable[[Any], None], path: str, seed: int, count: int, read: Event) -> None:
    """As `send_all`; what it raises is in *path*, as text."""
    try:
        send_all(put, path, seed, count, read)
    except BaseException:
        signal.setitimer(signal.ITIMER_REAL, 0)
        Path(path).write_text(traceback.format_exc())
        raise


def send_all(put: Callable[[Any], None], path: str, seed: int, count: int, read: Event) -> None:
    """Sends until it was interrupted *count* times; what was sent for certain is in *path*. It is
    told when all was *read*."""
    alarms = Alarms(seed, count)
    signal.signal(signal.SIGALRM, alarms.handle)
    sockets = [socket.socket() for _ in range(SOCKETS)]
    for _ in range(3):  # what was unpickled once is made without code in Python
        put(sockets[0])
    put("first")
    before = open_now()
    sent: list[tuple[bool, Any]] = []
    while alarms.left > 0:
        obj = message(len(sent), sockets)
        done: list[object] = []
        alarms.during(lambda: done.append(put(obj)))  # noqa: B023
        sent.append((bool(done), name_of(obj)))
    put(None)
    read.wait(_LONG)  # what waits in the queue's thread has descriptors
    wait_until(lambda: open_now() == before, "what was sent is closed")
    Path(path).write_text(json.dumps(summary(sent)))


def summary(sent: list[tuple[bool, Any]]) -> list[tuple[bool, Any]]:
    return [(certain, short(name)) for certain, name in sent]


def short(name: Any) -> Any:
    """A list by its number and its size: the file would be large."""
    is_list = isinstance(name, list) and isinstance(name[1], bytes)
    return [name[0], len(name[1]), name[1].count(b"x")] if is_list else name


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("name", CHANNELS)
def test_channels_stay_in_step(
    name: str,
    package: str,
    tmp_path: Path,
    times: Callable[[int], int],
    seed: int,
    counted: dict[str, Any],
) -> None:
    ctx = get_context("fork", backend=package)
    channel = ctx.Pipe(duplex=False) if name == "Pipe" else getattr(ctx, name)()
    put = channel[1].send if name == "Pipe" else channel.put
    get = channel[0].recv if name == "Pipe" else channel.get
    path, count = tmp_path / "sent", times(63)
    read = ctx.Event()
    child = ctx.Process(target=write, args=(put, str(path), seed, count, read))
    child.start()
    while (obj := get()) != "first":
        obj.close()
    alarms = Alarms(seed + 1, count)
    former = signal.signal(signal.SIGALRM, alarms.handle)
    arrived: list[Any] = []
    came: list[Any] = []
    try:
        while not arrived or arrived[-1] is not None:
            if alarms.left > 0:
                # In the list before anything comes in between.
                alarms.during(lambda: came.extend(map(called, (get,))))
            else:
                came.append(get())
            for obj in came:
                arrived.append(short(name_of(obj)))
                if isinstance(obj, socket.socket):
                    obj.close()
            came.clear()
            obj = None
    finally:
        signal.signal(signal.SIGALRM, former)
        read.set()
    child.join()
    assert child.exitcode == 0, path.read_text()
    said = json.loads(path.read_text())
    if name == "Pipe":
        for end in channel:
            end.close()
    else:
        finish(channel)
    counted.update(
        messages=len(said),
        interrupted_sends=count,
        interrupted_receives=count - max(0, alarms.left),
    )
    check(said, arrived[:-1])


def called(function: Callable[[], Any]) -> Any:
    return function()


def check(sent: list[tuple[bool, Any]], arrived: list[Any]) -> None:
    """Fails unless each message that was sent for certain has arrived once, and in order; and each
    of the others once or not at all."""
    position = 0
    for number, (certain, name) in enumerate(sent):
        if position < len(arrived) and arrived[position] == name:
            position += 1
        else:
            assert not certain, f"message {number}, {name}, is lost: {arrived[position:][:3]}"
    assert position == len(arrived), f"out of step: {arrived[position:][:3]}"
