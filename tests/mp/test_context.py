"""A context of ours: everything that the package's own context has."""

from __future__ import annotations

import pickle
from importlib import import_module
from typing import Any

import pytest

from fdshare import get_context
from mp.common import METHODS, PACKAGES, trackers  # noqa: F401


@pytest.fixture(params=PACKAGES)
def package(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("method", METHODS)
def test_it_has_what_the_packages_own_has(package: str, method: str) -> None:
    ours, stock = get_context(method, backend=package), import_module(package).get_context(method)
    assert isinstance(ours, type(stock))
    assert ours.get_start_method() == method
    assert set(dir(ours)) >= set(dir(stock))
    assert issubclass(ours.Process, stock.Process)
    assert ours.get_context() is ours
    assert ours.get_context("spawn") is get_context("spawn", backend=package)


def test_it_pickles_as_itself(package: str) -> None:
    ctx = get_context("spawn", backend=package)
    assert pickle.loads(pickle.dumps(ctx)) is ctx


@pytest.mark.parametrize("method", METHODS)
def test_locks_events_values_and_barriers(package: str, method: str) -> None:
    ctx = get_context(method, backend=package)
    event, value, array = ctx.Event(), ctx.Value("i", 1), ctx.Array("i", [1, 2])
    barrier, lock, condition = ctx.Barrier(2), ctx.RLock(), ctx.Condition()
    process = ctx.Process(target=_use, args=(event, value, array, barrier, lock, condition))
    process.start()
    barrier.wait(60)
    assert event.wait(60)
    process.join()
    assert (value.value, list(array), process.exitcode) == (7, [5, 2], 0)


def _use(event: Any, value: Any, array: Any, barrier: Any, lock: Any, condition: Any) -> None:
    with lock, condition:
        value.value = 7
        array[0] = 5
    barrier.wait()
    event.set()
