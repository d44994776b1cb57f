"""The queues of executors: the standard executor's call queue becomes one of ours."""

from __future__ import annotations

import concurrent.futures
import queue
import socket
import sys
from collections.abc import Iterator
from concurrent.futures.process import _CallItem
from operator import methodcaller
from typing import Any, cast

import pytest
from breaking import has_flock
from conftest import wait_until

from fdshare import get_context
from fdshare.errors import DescriptorLimit
from fdshare.mp.backends import backend_of
from fdshare.mp.workers.executor_queues import Call, adopt
from mp import children
from mp.common import descriptor_limit_reached, ends, finish, identity, trackers  # noqa: F401

CLASSES = backend_of("multiprocessing").CLASSES
# Those that do not wait for as long as it takes.
HASTY: list[dict[str, Any]] = [{"block": False}, {"timeout": 0}, {"timeout": 20}]


@pytest.fixture
def calls() -> Iterator[Any]:
    """The call queue of an executor of one worker: there is room for two calls."""
    executor: Any = concurrent.futures.ProcessPoolExecutor(1, mp_context=get_context("spawn"))
    calls, wakeup = executor._call_queue, executor._executor_manager_thread_wakeup
    adopt(CLASSES.CallQueue, calls)
    yield calls
    executor.shutdown()
    finish(calls)
    wakeup.close()


def test_a_call_queue_is_adopted_once(calls: Any) -> None:
    reader = calls._reader
    adopt(CLASSES.CallQueue, calls)
    assert calls._reader is reader
    assert isinstance(reader, CLASSES.Connection)


def recover(ctx: Any) -> None:
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=ctx) as executor:
        with descriptor_limit_reached(), pytest.raises(OSError):
            executor.submit(children.same, 1)
        assert executor.submit(children.same, 2).result() == 2


def test_an_executor_whose_queue_was_not_adopted_at_the_limit_works_later() -> None:
    ends(recover, get_context("fork"))


def test_a_call_queue_whose_adoption_fails_is_as_it_was() -> None:
    executor: Any = concurrent.futures.ProcessPoolExecutor(1, mp_context=get_context("spawn"))
    calls, wakeup = executor._call_queue, executor._executor_manager_thread_wakeup
    cls: type = type(calls)
    with pytest.raises(AttributeError):
        adopt(CLASSES.CallQueue, calls, cast("Any", object()))
    assert type(calls) is cls
    adopt(CLASSES.CallQueue, calls)
    calls.put(_CallItem(1, len, ("abc",), {}))
    assert calls.get().work_id == 1
    executor.shutdown()
    finish(calls)
    wakeup.close()


@pytest.mark.parametrize("limit", [{}, *HASTY], ids=str)
def test_a_call_is_received_as_from_any_queue(calls: Any, limit: dict[str, Any]) -> None:
    with socket.socket() as sock:
        for number in range(3):  # more than there is room for
            calls.put(_CallItem(number, children.identity, (sock,), {}))
            calls.put(
                _CallItem(7, Call.of(CLASSES.family, (children.identity, (sock,), {})), (), {})
            )
            call, submitted = calls.get(**limit), calls.get(**limit)
            assert call.work_id == number
            assert call.fn(*call.args) == submitted.fn() == identity(sock)
        calls.put("no call")
        assert calls.get(**limit) == "no call"


@pytest.mark.parametrize("limit", [*HASTY[:2], {"timeout": 0.01}, {"timeout": -1}], ids=str)
def test_an_empty_call_queue_says_so(calls: Any, limit: dict[str, Any]) -> None:
    for _ in range(3):
        with pytest.raises(queue.Empty):
            calls.get(**limit)
    calls.put(_CallItem(1, len, ("abc",), {}))
    assert calls.get().work_id == 1


@pytest.mark.parametrize("limit", HASTY, ids=str)
def test_a_call_stays_at_the_limit(calls: Any, limit: dict[str, Any]) -> None:
    with socket.socket() as sock:
        calls.put(_CallItem(1, children.identity, (sock,), {}))
        with descriptor_limit_reached(), pytest.raises(DescriptorLimit):
            calls.get(**limit)
        call = calls.get(**limit)
        assert call.fn(*call.args) == identity(sock)


def test_nothing_is_received_from_a_closed_call_queue(calls: Any) -> None:
    calls.close()
    for limit in ({}, *HASTY):
        with pytest.raises(ValueError, match="closed"):
            calls.get(**limit)


def fail_its_own_call(ctx: Any) -> None:
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=ctx) as executor:
        with pytest.raises(SystemExit):
            executor.submit(children.same, children.ExitsPickled()).result()
        assert executor.submit(children.same, 1).result() == 1


def test_a_call_that_is_no_exception_when_it_is_pickled() -> None:
    ends(fail_its_own_call, get_context("fork"))


def take_after_a_killed_reader(calls: Any, ctx: Any) -> None:
    reader = ctx.Process(target=methodcaller("get"), args=(calls,))
    reader.start()
    wait_until(lambda: has_flock(reader.pid))
    for limit in HASTY[:2]:
        with pytest.raises(queue.Empty):
            calls.get(**limit)
    reader.kill()
    reader.join()
    for number, limit in enumerate([{}, *HASTY]):
        calls.put(_CallItem(number, len, ("abc",), {}))
        assert calls.get(**limit).work_id == number


@pytest.mark.skipif(sys.platform != "linux", reason="descriptions of a process's own")
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_worker_that_is_killed_while_it_waits_keeps_nobody_from_the_queue(
    calls: Any, method: str
) -> None:
    ends(take_after_a_killed_reader, calls, get_context(method))
