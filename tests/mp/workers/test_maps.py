"""The tasks of a map: as they were at its call, and no larger than they must be."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any

import pytest

from fdshare import get_context
from fdshare.mp.backends import backend_of
from fdshare.mp.family import Family
from fdshare.mp.workers.maps import MappedTask, WaitingTasks, tasks_of_map
from fdshare.mp.workers.tasks import Task
from mp import children
from mp.common import PACKAGES, identity, open_now, shares_duplicates, trackers  # noqa: F401


@pytest.fixture(params=PACKAGES)
def package(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def family(package: str) -> Family:
    return backend_of(package).FAMILY


class Mark(int):
    pass


CONSTANT = [(1, "a", b"b", 1.5, True, None), [(1, "a"), (b"b",), ()], range(5), ["a" * 100_000]]
OTHER = [
    [[1]],
    [(1,), 2],
    [(1, [])],
    [((1,),)],
    [Mark(1)],
    [(Mark(1),)],
    {1: 2},
    "text",
    [print],
    [{}],
]


@pytest.mark.parametrize("items", CONSTANT + OTHER)
def test_the_results(family: Family, items: Any) -> None:
    for size in 1, 2, 100:
        tasks = tasks_of_map(family, family.pool.mapstar, children.same, items, size)
        tasks.job = 7
        taken = list(tasks)
        assert [task[:2] for task in taken] == [(7, index) for index in range(len(taken))]
        kinds = {type(function) for _, _, function, _, _ in taken}
        is_late = items in CONSTANT and (size <= 2 or type(items) is range)
        assert kinds == {MappedTask if is_late else Task}
        results = [function(*args, **kwds) for _, _, function, args, kwds in taken]
        assert all(len(part) == size for part in results[:-1])
        assert [item for part in results for item in part] == list(items)


def test_each_item_is_the_arguments(family: Family) -> None:
    tasks = tasks_of_map(family, family.pool.starmapstar, max, [(1, 2), (4, 3), (5,) * 2], 2)
    first, second = [function for _, _, function, _, _ in tasks]
    assert type(first) is MappedTask
    assert (first(), second()) == ([2, 4], [5])


def test_a_mapper_that_is_not_the_pools(family: Family) -> None:
    (task,) = tasks_of_map(family, children.same, abs, range(2), 2)
    assert task[2]() == (abs, (0, 1))


def test_what_cannot_change_is_not_pickled_before_its_turn(family: Family) -> None:
    tasks = tasks_of_map(family, family.pool.mapstar, abs, range(10**12), 1)
    assert [function() for _, _, function, _, _ in islice(tasks, 3)] == [[0], [1], [2]]
    tasks.close()


@pytest.mark.parametrize("items", [range(3), [0, 1, 2]], ids=repr)
def test_what_the_program_has_told_dill_of_numbers(
    items: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mark(pickler: Any, _: int) -> None:
        pickler.write(b"Vmarked\n")

    monkeypatch.setitem(pytest.importorskip("dill").Pickler.dispatch, int, mark)
    family = backend_of("multiprocess").FAMILY
    tasks = tasks_of_map(family, family.pool.mapstar, children.same, items, 2)
    results = [function(*args, **kwds) for _, _, function, args, kwds in tasks]
    assert results == [["marked", "marked"], ["marked"]]


def test_long_batches_of_a_range_are_pickled_in_the_call(family: Family) -> None:
    for size, kind in (1 << 15, MappedTask), ((1 << 15) + 1, Task):
        tasks = tasks_of_map(family, family.pool.mapstar, abs, range(2 * size), size)
        for start in 0, size:
            _, _, function, args, kwds = next(tasks)
            assert type(function) is kind
            assert function(*args, **kwds) == list(range(start, start + size))
        assert list(tasks) == []


@shares_duplicates
def test_a_function_with_a_descriptor(family: Family) -> None:
    with socket.socket() as sock:
        before = open_now()
        tasks = tasks_of_map(
            family, family.pool.mapstar, partial(children.answer, None, sock), (1, 2), 1
        )
        assert open_now() == before + 1
    assert next(tasks)[2].bundle is not None  # type: ignore[attr-defined]
    tasks.close()
    assert open_now() == before - 1


def test_close_takes_all_that_nobody_has_taken(family: Family) -> None:
    with socket.socket() as sock:
        before = open_now()
        tasks = tasks_of_map(family, family.pool.mapstar, children.identity, [sock] * 5, 1)
        _, _, function, _, _ = next(tasks)
        tasks.close()
        assert list(tasks) == []
        assert isinstance(function, Task)
        function.close()
        assert open_now() == before


@contextmanager
def busy(package: str) -> Iterator[tuple[Any, int]]:
    """A pool whose worker waits for a byte; the number to write that to."""
    never, go = os.pipe()
    with get_context("fork", backend=package).Pool(1) as pool:
        pool.apply_async(os.read, (never, 1))
        yield pool, go
        pool.terminate()
        pool.join()
    os.close(never)
    os.close(go)


def test_what_changes_after_the_call_does_not_count(package: str) -> None:
    items: list[Any] = [1, 2, 3]
    bound = [10]
    with busy(package) as (pool, go):
        results = [
            pool.map_async(partial(operate, bound), items, 1),
            pool.starmap_async(partial(operate, bound), [(1,), (2,), (3,)]),
            pool.map_async(partial(operate, bound), [*items, [4]]),
        ]
        bound[0] = 0
        items[:] = [0]
        os.write(go, b"x")
        assert results[0].get(30) == results[1].get(30) == [[10, 1], [10, 2], [10, 3]]
        assert results[2].get(30) == [[10, 1], [10, 2], [10, 3], [10, [4]]]


def operate(bound: list[int], item: Any) -> Any:
    return [*bound, item]


def test_what_cannot_be_pickled_raises_in_the_call(package: str) -> None:
    with busy(package) as (pool, _):
        for function, items in (children.Unpicklable(), (1, 2)), (abs, [children.Unpicklable()]):
            with pytest.raises(AttributeError, match="not to be pickled"):
                pool.map_async(function, items)
        assert len(pool._cache) == 1


def test_errors_of_the_function_and_iterators(package: str) -> None:
    with get_context("fork", backend=package).Pool(1) as pool:
        with pytest.raises(RuntimeError):
            pool.map(children.explode, range(3))
        assert pool.map(abs, iter([-1, 2])) == [1, 2]
        assert pool.map(abs, []) == pool.map(abs, range(0)) == []
        assert pool.map(len, [b"x" * 1_000_000] * 3, 2) == [1_000_000] * 3
        pool.close()
        pool.join()


def test_a_task_that_has_no_room_is_an_error_of_its_job(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dumps(*_: Any) -> bytes:
        raise MemoryError

    tasks: WaitingTasks = tasks_of_map(family, family.pool.mapstar, abs, (1, 2), 1)
    monkeypatch.setattr("pickle.dumps", dumps)
    for _, index, function, args, _ in tasks:
        assert index in (0, 1)
        with pytest.raises(MemoryError):
            function(*args)
