"""Threads that get no signal."""

from __future__ import annotations

import signal
import threading

import pytest

from fdshare.kernel.thread_signals import start_without_signals


def blocked() -> set[int]:
    return set(signal.pthread_sigmask(signal.SIG_BLOCK, ()))


def test_it_gets_none_and_its_starter_all() -> None:
    before = blocked()
    seen: list[set[int]] = []
    thread = threading.Thread(target=lambda: seen.append(blocked()))
    start_without_signals(thread)
    assert blocked() == before
    thread.join()
    assert {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2} <= seen[0]
    # But for those of its own faults, which faulthandler shows.
    assert signal.SIGSEGV not in seen[0]


def test_one_that_cannot_start_leaves_signals_as_they_are() -> None:
    before = blocked()
    thread = threading.Thread()
    start_without_signals(thread)
    thread.join()
    with pytest.raises(RuntimeError):
        start_without_signals(thread)
    assert blocked() == before
