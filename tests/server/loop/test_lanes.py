"""Threads for calls that may never return: what one user's calls hang is that user's loss."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest
from conftest import wait_until

from fdshare.server.loop.lanes import Lanes


@pytest.fixture
def lanes() -> Iterator[Lanes]:
    lanes = Lanes()
    yield lanes
    lanes.rest()


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Opened at the end, whatever happens: no thread hangs for ever."""
    gate = threading.Event()
    yield gate
    gate.set()


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """`rest` waits longer than a machine at work may keep a thread from running."""
    monkeypatch.setattr("fdshare.server.loop.lanes._STUCK", 20)


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def test_they_leave_signals_to_the_main_thread(lanes: Lanes) -> None:
    seen: list[set[int]] = []
    lanes.put(7, lambda: seen.append(set(signal.pthread_sigmask(signal.SIG_BLOCK, ()))))
    wait_until(lambda: seen)
    assert signal.SIGTERM in seen[0]


def test_the_calls_of_a_uid_are_made_in_order_and_never_two_at_once(lanes: Lanes) -> None:
    made: list[int] = []
    at_work = threading.Lock()

    def call(number: int) -> None:
        assert at_work.acquire(blocking=False)
        made.append(number)
        at_work.release()

    for number in range(300):
        lanes.put(7, lambda number=number: call(number))
    wait_until(lambda: len(made) == 300)
    assert made == list(range(300))


def test_a_call_that_hangs_holds_up_its_own_uid_alone(lanes: Lanes, gate: threading.Event) -> None:
    made: list[int] = []
    lanes.put(1, gate.wait)
    lanes.put(1, lambda: made.append(1))
    for uid in range(2, 30):
        lanes.put(uid, lambda uid=uid: made.append(uid))
    wait_until(lambda: len(made) == 28)
    assert sorted(made) == list(range(2, 30))
    wait_until(lambda: lanes.hangs(1))
    assert lanes.hanging() == [1]
    gate.set()
    wait_until(lambda: made[-1] == 1)
    assert not lanes.hangs(1)


def test_a_call_that_gives_way_does_not_hang(lanes: Lanes) -> None:
    hangs: list[bool] = []

    def call() -> None:
        lanes.give_way(7, 60.0)  # no rest is that long
        hangs.append(lanes.hangs(7))

    lanes.put(7, call)
    wait_until(lambda: hangs)
    assert hangs == [False]


def test_many_that_hang_leave_a_thread_for_the_next(lanes: Lanes, gate: threading.Event) -> None:
    made: list[int] = []
    for uid in range(20):
        lanes.put(uid, gate.wait)
    lanes.put(99, lambda: made.append(99))
    wait_until(lambda: made)
    gate.set()


def test_a_call_that_fails_is_not_the_last(lanes: Lanes, caplog: pytest.LogCaptureFixture) -> None:
    made: list[int] = []
    lanes.put(1, lambda: 1 // 0)
    lanes.put(1, lambda: made.append(1))
    wait_until(lambda: made)
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.usefixtures("patient")
def test_threads_that_cannot_start_are_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    start, full = threading.Thread.start, True

    def limited(thread: threading.Thread) -> None:
        if full:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    lanes = Lanes()
    assert not lanes.has_threads
    assert not lanes.starved
    made: list[int] = []
    lanes.put(1, lambda: made.append(1))
    assert lanes.starved
    full = False
    lanes.put(2, lambda: made.append(2))
    wait_until(lambda: sorted(made) == [1, 2])
    lanes.rest()
    full = True
    lanes.resume()
    lanes.put(3, lambda: made.append(3))
    assert not lanes.has_threads
    full = False
    assert lanes.has_threads
    assert not lanes.starved
    wait_until(lambda: 3 in made)
    lanes.rest()


@pytest.mark.usefixtures("patient")
def test_no_thread_is_left_at_rest(lanes: Lanes) -> None:
    """So that a forked child has nothing of them, nor of those that were just started."""
    before = threads()
    for _ in range(3):
        lanes.rest()
        assert not lanes.has_threads
        assert "fdshare-lane" not in [thread.name for thread in threading.enumerate()]
        wait_until(lambda: threads() < before)
        made: list[int] = []
        lanes.put(1, lambda made=made: made.append(1))  # nobody is there to make it
        lanes.resume()
        wait_until(lambda made=made: made)
        wait_until(lambda: threads() == before)


def test_stop_waits_for_what_does_not_hang(lanes: Lanes, gate: threading.Event) -> None:
    made: list[int] = []
    lanes.put(1, gate.wait)
    for uid in range(2, 20):
        lanes.put(uid, lambda uid=uid: made.append(uid))
    lanes.stop(0.5)
    assert len(made) == 18
