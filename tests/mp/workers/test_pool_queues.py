"""What pools do with the queues between them and their workers."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from typing import Any

import pytest
from conftest import wait_until

from fdshare import get_context
from mp import children
from mp.common import METHODS, PACKAGES, ends, identity, trackers  # noqa: F401


@pytest.fixture(params=PACKAGES)
def package(request: pytest.FixtureRequest) -> str:
    return str(request.param)


SIZES = [0, 5_000, 0, 15_000, 20_000, 0, 130_000, 250_000, 1 << 20]


def mix(ctx: Any) -> None:
    with ctx.Pool(3, maxtasksperchild=50) as pool, open(os.devnull) as file:
        sizes = SIZES * 30
        results = [pool.apply_async(bytes, (size,)) for size in sizes]
        files = [pool.apply_async(children.same, (file,)) for _ in range(50)]
        assert [len(result.get(60)) for result in results] == sizes
        for result in files:
            with result.get(60) as copy:
                assert identity(copy) == identity(file)
        assert sorted(map(len, pool.imap_unordered(bytes, sizes))) == sorted(sizes)
        left = [pool.apply_async(bytes, (size,)) for size in sizes]
        pool.close()  # with all of them in the queues
        pool.join()
        assert [len(result.get(0)) for result in left] == sizes


@pytest.mark.parametrize("method", METHODS)
def test_a_mix_of_results_is_complete(package: str, method: str) -> None:
    ends(mix, get_context(method, backend=package))


def take_in_order(ctx: Any) -> None:
    with ctx.Pool(1) as pool:
        sizes = SIZES * 10
        assert list(map(len, pool.imap_unordered(bytes, sizes))) == sizes


def test_the_results_of_one_worker_are_in_the_order_of_its_tasks(package: str) -> None:
    ends(take_in_order, get_context("fork", backend=package))


def work_without_the_lock(ctx: Any) -> None:
    with ctx.Pool(2) as pool:
        # As a worker leaves it that is killed while it sends a long result.
        assert pool._outqueue._wlock.acquire()
        assert pool.map(children.same, range(100), 1) == list(range(100))
        assert pool.apply(bytes, (10_000,)) == bytes(10_000)


def test_small_results_need_no_lock(package: str) -> None:
    ends(work_without_the_lock, get_context("fork", backend=package))


def kill_workers(ctx: Any) -> None:
    with ctx.Pool(2) as pool:
        for _ in range(10):
            for size in SIZES[:2] * 50:
                pool.apply_async(bytes, (size,))
            (worker, *_) = list(pool._pool)
            os.kill(worker.pid, signal.SIGKILL)
            wait_until(lambda: worker not in pool._pool)  # noqa: B023
        assert pool.map(len, [b"ab"] * 500, 1) == [2] * 500


def test_workers_that_are_killed_while_they_send(package: str) -> None:
    ends(kill_workers, get_context("fork", backend=package))


def ends_of_the_pipe(pid: int, pipe: str) -> int:
    found = 0
    for link in os.scandir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):  # closed in the meantime
            found += os.readlink(link.path) == pipe
    return found


def count_ends(ctx: Any) -> None:
    with ctx.Pool(2) as pool:
        pipe = os.readlink(f"/proc/self/fd/{pool._outqueue._small._writer.fileno()}")
        assert ends_of_the_pipe(os.getpid(), pipe) == 2
        for worker in pool._pool:
            wait_until(lambda: ends_of_the_pipe(worker.pid, pipe) == 1)  # noqa: B023


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
@pytest.mark.parametrize("method", METHODS)
def test_a_worker_has_the_end_alone_that_it_writes_to(package: str, method: str) -> None:
    ends(count_ends, get_context(method, backend=package))
