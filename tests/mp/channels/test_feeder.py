"""The feeder of a queue: what is sent at once, what waits, and what is dropped."""

from __future__ import annotations

import _thread
import os
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fdshare.errors import DescriptorLimit
from fdshare.mp.channels.feeder import Feeder
from fdshare.mp.pickling.bundle import Bundle, Encoded
from mp.common import descriptor_limit_reached, identity, open_now, read_message


class Harness:
    """A feeder with both ends, and what it called."""

    def __init__(self) -> None:
        self.near, self.far = socket.socketpair()
        self.lock = threading.Lock()
        self.called: list[str] = []
        self.ended = threading.Event()
        self.feeder = Feeder(
            self.near, self, lambda: self.called.append("closing"), self.end, self.fail
        )

    def put(self, message: Encoded, obj: Any = None, patience: float | None = None) -> bool:
        """False if it will not arrive."""
        accepted = [False]
        self.feeder.put(message, accepted, obj, patience)
        return accepted[0]

    # The write lock, as multiprocessing's: acquire(block).

    def acquire(self, block: bool = True) -> bool:
        return self.lock.acquire(block)

    def release(self) -> None:
        self.lock.release()

    def end(self) -> None:
        self.called.append("ended")
        self.ended.set()

    def fail(self, error: BaseException, obj: Any) -> None:
        self.called.append(f"{type(error).__name__} {obj}")

    def read(self) -> tuple[bytes, int]:
        message = read_message(self.far)
        if isinstance(message, bytes):
            return message, 0
        data, count = bytes(message.data), len(message.owned or ())
        message.close()
        return data, count


@pytest.fixture
def harness() -> Iterator[Harness]:
    harness = Harness()
    yield harness
    harness.feeder.stop()
    harness.far.close()
    with harness.feeder.thread_ended:
        pass
    harness.near.close()


def test_with_room_it_is_sent_at_once_without_a_thread(harness: Harness, null: int) -> None:
    before = open_now()
    assert harness.put(b"bytes")
    assert harness.put(Bundle(b"data", [null]))
    assert open_now() == before  # no duplicate was made
    assert not harness.feeder.has_thread
    assert harness.read() == (b"bytes", 0)
    assert harness.read() == (b"data", 1)


def test_while_somebody_writes_it_waits(harness: Harness, null: int) -> None:
    harness.acquire()
    assert harness.put(Bundle(b"data", [null]))
    assert harness.feeder.has_thread
    assert harness.put(b"after")
    harness.release()
    assert harness.read() == (b"data", 1)
    assert harness.read() == (b"after", 0)


def test_when_full_it_waits_in_order(harness: Harness, null: int) -> None:
    for number in range(600):
        harness.put(Bundle(b"%d" % number, [null]) if number % 2 else b"%d" % number)
    for number in range(600):
        assert harness.read() == (b"%d" % number, number % 2)


def test_a_message_larger_than_the_pipe(harness: Harness, null: int) -> None:
    data = os.urandom(1 << 20)
    harness.put(Bundle(data, [null]))
    harness.put(data[:10])
    assert harness.read() == (data, 1)
    assert harness.read() == (data[:10], 0)


def test_what_was_put_may_be_closed(harness: Harness) -> None:
    harness.acquire()
    with socket.socket() as sock:
        expected = identity(sock)
        harness.put(Bundle(b"data", [sock.fileno()], sock))
    harness.release()
    message = read_message(harness.far)
    assert isinstance(message, Bundle)
    assert identity((message.owned or [])[0]) == expected
    message.close()


def test_no_descriptor_to_keep_it_with(harness: Harness, null: int) -> None:
    harness.acquire()
    with descriptor_limit_reached(), pytest.raises(DescriptorLimit, match="RLIMIT_NOFILE"):
        harness.put(Bundle(b"data", [null]))
    harness.release()
    harness.put(b"next")
    assert harness.read() == (b"next", 0)


@pytest.mark.parametrize("patience", [0.0, 0.05])
def test_a_full_pipe_and_no_descriptor_to_keep_it_with(
    harness: Harness, null: int, patience: float
) -> None:
    harness.feeder._drains = False  # no reader will make room
    count = 0
    with descriptor_limit_reached(), pytest.raises(DescriptorLimit, match="RLIMIT_NOFILE"):
        while True:
            assert harness.put(Bundle(b"data", [null]), patience=patience)
            count += 1
    assert harness.lock.acquire(False)
    harness.lock.release()
    harness.put(b"next")
    for _ in range(count):
        assert harness.read() == (b"data", 1)
    assert harness.read() == (b"next", 0)


def test_without_patience_it_waits_for_room(harness: Harness, null: int) -> None:
    harness.feeder._drains = False
    sent = threading.Event()
    with descriptor_limit_reached():
        with pytest.raises(DescriptorLimit):
            while True:
                harness.put(Bundle(b"data", [null]), patience=0.0)
        thread = threading.Thread(
            target=lambda: harness.put(Bundle(b"last", [null])) and sent.set()
        )
        thread.start()
        while harness.lock.acquire(False):  # until it has begun
            harness.lock.release()
        harness.put(b"meanwhile")
    while harness.read() != (b"last", 1):
        pass
    thread.join()
    assert sent.is_set()
    assert harness.read() == (b"meanwhile", 0)


def test_stop_waits_for_what_was_accepted(harness: Harness) -> None:
    for _ in range(20):
        harness.put(Bundle(b"x" * 50_000))
    harness.feeder.stop()
    assert harness.called == ["closing"]
    for _ in range(20):
        assert harness.read() == (b"x" * 50_000, 0)
    assert harness.ended.wait(30)
    assert harness.called == ["closing", "ended"]


def test_stop_without_a_thread_is_at_once(harness: Harness) -> None:
    harness.put(b"1")
    harness.feeder.stop()
    assert harness.called == ["closing", "ended"]


def test_a_reader_that_is_gone(harness: Harness) -> None:
    for _ in range(20):
        harness.put(Bundle(b"x" * 50_000), "obj")
    harness.far.close()
    harness.feeder.stop()
    assert harness.ended.wait(30)
    reported = [word for word in harness.called if word.endswith("obj")]
    assert all(word.split()[0] in ("BrokenPipeError", "ConnectionResetError") for word in reported)
    assert harness.called[-1] == "ended"


class NoThreads:
    """While it is there, no thread of a feeder can be started: the first put() is told so when
    `go` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.starting, self.go = threading.Event(), threading.Event()
        monkeypatch.setattr(_thread, "start_new_thread", self.refuse)

    def refuse(self, *_: object) -> None:
        self.starting.set()
        self.go.wait()
        raise RuntimeError("can't start new thread")  # EAGAIN of clone(2)


@pytest.fixture
def half_refused(
    harness: Harness, null: int, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], None]:
    """Of two threads that put while somebody writes one is told that no thread can be started;
    what the other one put waits. The result lets threads be started."""

    def put() -> None:
        try:
            harness.feeder.put(Bundle(b"refused", [null]), accepted)
        except RuntimeError as error:
            refused.append(error)

    refused: list[RuntimeError] = []
    accepted: list[Any] = [False]
    harness.acquire()
    before = open_now()
    no_threads = NoThreads(monkeypatch)
    first = threading.Thread(target=put)
    first.start()
    no_threads.starting.wait()
    assert harness.put(b"accepted", "obj")
    no_threads.go.set()
    first.join()
    assert refused
    assert not accepted[0]
    assert open_now() == before
    return monkeypatch.undo


def test_where_no_thread_can_start_only_the_callers_message_is_dropped(
    harness: Harness, half_refused: Callable[[], None]
) -> None:
    with pytest.raises(RuntimeError):
        harness.put(b"refused")
    half_refused()
    harness.release()
    assert harness.put(b"next")
    assert harness.read() == (b"accepted", 0)
    assert harness.read() == (b"next", 0)
    assert harness.called == []


def test_without_a_thread_what_waits_is_sent_where_there_is_room(
    harness: Harness, half_refused: Callable[[], None]
) -> None:
    """Each later put was refused, whatever room there was."""
    harness.release()
    assert harness.put(b"next")
    assert harness.read() == (b"accepted", 0)
    assert harness.read() == (b"next", 0)
    assert harness.put(b"directly")
    assert harness.read() == (b"directly", 0)
    assert not harness.feeder.has_thread
    assert harness.called == []
    half_refused()


def test_stop_sends_what_waits_for_a_thread(
    harness: Harness, half_refused: Callable[[], None]
) -> None:
    half_refused()
    harness.release()
    harness.feeder.stop()
    assert harness.read() == (b"accepted", 0)
    assert harness.ended.wait(30)
    assert harness.called == ["closing", "ended"]


def test_stop_reports_what_still_has_no_thread(
    harness: Harness, half_refused: Callable[[], None]
) -> None:
    harness.feeder.stop()
    assert harness.called == ["closing", "RuntimeError obj", "ended"]
    harness.release()


def test_what_has_begun_is_sent_without_a_thread(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_threads = NoThreads(monkeypatch)
    no_threads.go.set()
    large = os.urandom(1 << 20)
    put: list[bool] = []
    putting = threading.Thread(target=lambda: put.append(harness.put(large)))
    putting.start()
    assert harness.read() == (large, 0)
    putting.join()
    assert put == [True]
    assert harness.lock.acquire(False)
    harness.lock.release()
