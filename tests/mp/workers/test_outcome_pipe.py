"""A pipe of outcomes beside a stream: order, parts, and what a killed worker leaves behind."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from threading import Thread
from typing import Any

import pytest
from breaking import state
from conftest import wait_until

from fdshare import get_context
from fdshare.kernel import system
from fdshare.mp.backends import backend_of
from fdshare.mp.channels.framing import LENGTH
from fdshare.mp.pickling.bundle import Bundle
from fdshare.mp.workers import outcome_pipe
from fdshare.mp.workers.outcome_pipe import LONGEST
from fdshare.mp.workers.tasks import RETURNED, headed
from mp.common import (  # noqa: F401
    PACKAGES,
    ends,
    identity,
    open_now,
    trackers,
    writable,
)

LONG = 2 * LONGEST
HUGE = 250_000  # longer than the stream has room for, and not in a memfd
ROOM = outcome_pipe._ROOM


@pytest.fixture(params=PACKAGES)
def package(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Outcomes:
    """An outcome queue of a pool, with both ends in this process."""

    def __init__(self, package: str) -> None:
        classes = backend_of(package).CLASSES
        self.queue: Any = classes.OutcomeQueue(ctx=get_context("fork", backend=package))
        self.pipe = self.queue._small

    def put(self, index: int, value: Any) -> None:
        self.queue.put((7, index, (True, value)))

    def take(self) -> tuple[int, Any]:
        job, index, (ok, value) = self.queue.take()
        assert (job, ok) == (7, True)
        return index, value

    def send_part(self, index: int, part: bytes) -> None:
        """What is left behind by a worker that is killed after it."""
        frame = outcome_pipe._pack(len(part), outcome_pipe._PART, 7, index, 0)
        os.write(self.pipe._writer.fileno(), frame + part)

    def is_in_time(self) -> bool:
        """True if nothing that was announced is missing."""
        return self.pipe._due is None and not self.pipe._is_late


@pytest.fixture
def outcomes(package: str) -> Iterator[Outcomes]:
    made = Outcomes(package)
    before = open_now()
    yield made
    assert open_now() == before
    made.queue.abandon()
    made.queue.close()
    assert open_now() == before - 4


def test_what_is_small_is_in_the_pipe(outcomes: Outcomes) -> None:
    for size in 0, 1000, LONGEST - 100:
        outcomes.put(1, bytes(size))
        assert not outcomes.queue._reader.poll()
        assert outcomes.take() == (1, bytes(size))


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_lengths_about_those_of_parts(outcomes: Outcomes, parts: int) -> None:
    for size in range(parts * ROOM - 2, parts * ROOM + 3):
        content = os.urandom(size)
        if size <= LONGEST:
            outcomes.pipe.send(RETURNED, 7, 1, content)
            assert outcomes.pipe.take(None) == (RETURNED, 7, 1, content)
        outcomes.put(2, content[20:])
        assert outcomes.take() == (2, content[20:])


def test_no_part_is_longer_than_a_write_that_is_done_as_a_whole(outcomes: Outcomes) -> None:
    outcomes.put(1, bytes(LONGEST - 100))
    reader = outcomes.pipe._reader.fileno()
    data = b""
    for _ in range(4):
        data += os.read(reader, 4096)
        (size,) = outcome_pipe._FRAME.unpack_from(data)[:1]
        assert len(data) == outcome_pipe._SIZE + size
        data = b""


def test_all_that_is_in_the_pipe_is_one_read(outcomes: Outcomes) -> None:
    for index in range(500):
        outcomes.put(index, index)
    assert outcomes.take() == (0, 0)
    assert not outcomes.pipe._reader.poll()
    assert [outcomes.take() for _ in range(499)] == [(n, n) for n in range(1, 500)]


@pytest.mark.skipif(system.SET_PIPE_SIZE is None, reason="pipes have one size here")
def test_workers_need_not_wait_for_a_pool_that_is_busy(outcomes: Outcomes) -> None:
    """A part takes a page, and a pipe has 16 of them if nobody asks for more."""
    sent = [(index, bytes(LONGEST - 100)) for index in range(12)]

    def run() -> None:
        for index, value in sent:
            outcomes.put(index, value)
        assert [outcomes.take() for _ in sent] == sent

    ends(run)


def test_what_a_read_has_cut_is_put_together(
    outcomes: Outcomes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outcome_pipe, "_CHUNK", 7)
    sent = list(enumerate(["a", bytes(2 * ROOM), "b"]))
    for index, value in sent:
        outcomes.put(index, value)
    assert [outcomes.take() for _ in sent] == sent


def test_outcomes_arrive_in_the_order_in_which_they_were_sent(outcomes: Outcomes) -> None:
    with open(os.devnull) as file:
        sent = ["a", bytes(LONGEST), "b", file, bytes(LONG), file, bytes(2 * ROOM), "c"]
        for index, value in enumerate(sent):
            outcomes.put(index, value)
        for index, value in enumerate(sent):
            arrived = outcomes.take()
            if value is file:
                with arrived[1] as copy:
                    assert (arrived[0], identity(copy)) == (index, identity(file))
            else:
                assert arrived == (index, value)
    assert outcomes.is_in_time()


def test_what_has_no_room_is_read_while_it_is_sent(outcomes: Outcomes) -> None:
    def put() -> None:
        for index in range(3):
            outcomes.put(2 * index, bytes(HUGE))
            outcomes.put(2 * index + 1, index)
        outcomes.queue.put(None)

    def run() -> None:
        worker = Thread(target=put)
        worker.start()
        for index in range(3):
            assert outcomes.take() == (2 * index, bytes(HUGE))
            assert outcomes.take() == (2 * index + 1, index)
        with pytest.raises(EOFError):
            outcomes.take()
        worker.join()

    ends(run)


def test_a_worker_that_was_killed_after_a_part(outcomes: Outcomes) -> None:
    outcomes.send_part(1, b"a")
    outcomes.put(2, bytes(2 * ROOM))
    outcomes.put(3, "c")
    assert [outcomes.take() for _ in range(2)] == [(2, bytes(2 * ROOM)), (3, "c")]


@pytest.mark.parametrize("size", [1, 2 * ROOM])
def test_a_worker_that_a_handler_has_interrupted_after_a_part(
    outcomes: Outcomes, size: int
) -> None:
    """What it sends then is the outcome of the same job."""
    for _ in range(3):
        outcomes.send_part(1, b"a")
    outcomes.put(1, bytes(size))
    assert outcomes.take() == (1, bytes(size))
    assert not outcomes.pipe._parts


@pytest.mark.parametrize("begun", [b"", LENGTH.pack(LONG), LENGTH.pack(LONG) + b"a"])
def test_a_worker_that_was_killed_after_an_announcement(outcomes: Outcomes, begun: bytes) -> None:
    def run() -> None:
        outcomes.put(1, "a")
        outcomes.pipe.announce(7, 2)
        outcomes.queue._writer._carrier().sendall(begun)
        outcomes.put(3, "c")
        assert [outcomes.take() for _ in range(2)] == [(1, "a"), (3, "c")]
        outcomes.put(4, "d")
        assert outcomes.take() == (4, "d")
        outcomes.queue.put(None)
        with pytest.raises(EOFError):
            outcomes.take()

    ends(run)


def test_what_is_late_comes(outcomes: Outcomes) -> None:
    def run() -> None:
        message = headed(RETURNED, 7, 1, b"N.")  # None
        outcomes.pipe.announce(7, 1)
        outcomes.put(2, "b")
        assert outcomes.take() == (2, "b")
        assert not outcomes.is_in_time()
        taken: list[Any] = []
        pool = Thread(target=lambda: taken.append(outcomes.take()))
        pool.start()
        wait_until(lambda: state(pool.native_id or 0) == "S")
        outcomes.queue._put_message(message)
        pool.join()
        assert taken == [(1, None)]
        assert outcomes.is_in_time()

    ends(run)


@pytest.mark.parametrize("size", [1, LONG])
def test_a_send_that_fails(outcomes: Outcomes, size: int) -> None:
    bundle = Bundle(bytes(size), [-1])
    with pytest.raises(OSError, match="Bad file descriptor") as caught:
        outcomes.queue._send_announced(7, 1, headed(RETURNED, 7, 1, bundle))
    assert caught.value.errno == errno.EBADF
    # A short one is announced after the send.
    assert outcomes.pipe._reader.poll() == (size == LONG)
    outcomes.put(1, "a")
    outcomes.put(2, bytes(LONG))
    assert [outcomes.take() for _ in range(2)] == [(1, "a"), (2, bytes(LONG))]
    assert outcomes.is_in_time()


def test_what_was_sent_and_not_announced_is_dropped(outcomes: Outcomes) -> None:
    """A handler has raised in between, and the worker has sent that."""
    with open(os.devnull) as file:
        bundle = Bundle(b"", [file.fileno()])
        outcomes.queue._put_message(headed(RETURNED, 7, 1, bundle))
        outcomes.put(1, "a")
        outcomes.put(2, bytes(LONG))
        assert [outcomes.take() for _ in range(2)] == [(1, "a"), (2, bytes(LONG))]


def fill(outcomes: Outcomes, value: Any) -> tuple[Thread, list[int]]:
    """A worker that has sent many outcomes, and waits for room."""
    put: list[int] = []

    def work() -> None:
        for index in range(5000):
            outcomes.put(index, value)
            put.append(index)

    worker = Thread(target=work)
    worker.start()
    wait_until(lambda: state(worker.native_id or 0) == "S")
    wait_until(lambda: not writable(outcomes.pipe._writer))
    return worker, put


def test_workers_wait_for_room(outcomes: Outcomes) -> None:
    def run() -> None:
        worker, put = fill(outcomes, bytes(100))
        assert len(put) < 5000
        assert [outcomes.take()[0] for _ in range(5000)] == list(range(5000))
        worker.join()

    ends(run)


@pytest.mark.parametrize("size", [100, LONGEST])
def test_ended_while_workers_wait_for_room(outcomes: Outcomes, size: int) -> None:
    def run() -> None:
        worker, put = fill(outcomes, bytes(100))
        outcomes.queue.abandon()
        worker.join()
        assert len(put) < 5000
        with pytest.raises(EOFError):
            outcomes.take()

    ends(run)


def test_ended_while_the_pool_waits(outcomes: Outcomes) -> None:
    def run() -> None:
        ended: list[bool] = []

        def take() -> None:
            with pytest.raises(EOFError):
                outcomes.take()
            ended.append(True)

        pool = Thread(target=take)
        pool.start()
        wait_until(lambda: state(pool.native_id or 0) == "S")
        outcomes.queue.abandon()
        pool.join()
        assert ended

    ends(run)


def test_the_pipe_ends_where_the_pool_is_gone(package: str) -> None:
    outcomes = Outcomes(package)
    outcomes.pipe._reader.close()
    with pytest.raises(SystemExit):
        outcomes.put(1, "a")
    outcomes.queue.close()
