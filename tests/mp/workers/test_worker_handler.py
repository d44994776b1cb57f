"""The thread that replaces workers: where no process can be started, it tries again."""

from __future__ import annotations

import os

import pytest
from conftest import wait_until
from crowding import run_crowded
from users import needs_root

from fdshare import get_context
from mp.common import (  # noqa: F401
    METHODS,
    PACKAGES,
    descriptor_limit_reached,
    ends,
    trackers,
)

pytestmark = pytest.mark.parametrize("package", PACKAGES)

BEGINS = """
import os, sys
from crowding import Crowd
from fdshare import get_context
method, package = sys.argv[1:]
ctx = get_context(method, backend=package)
crowd = Crowd(ctx)
"""
WAITS = """
pool = ctx.Pool(1, maxtasksperchild=1)
pool.apply(os.getpid)
with crowd:
    results = [pool.apply_async(abs, (-number,)) for number in range(4)]
    results[3].wait(0.5)
    before = len(os.listdir("/proc/self/fd"))
    results[3].wait(0.5)
    print(results[3].ready(), len(os.listdir("/proc/self/fd")) < before + 10)  # of an attempt
print([result.get(30) for result in results])
pool.close()
pool.join()
"""
ENDS = """
pool = ctx.Pool(1, maxtasksperchild=1)
pool.apply(os.getpid)
with crowd:
    pool.apply_async(os.getpid).wait(0.2)
    pool.terminate()
    pool.join()
pool = ctx.Pool(1, maxtasksperchild=1)
pool.apply(os.getpid)
with crowd:
    pool.close()
    pool.join()
pool = ctx.Pool(1, maxtasksperchild=1)
pool.apply(os.getpid)
with crowd:
    result = pool.apply_async(os.getpid)
    pool.close()
    result.wait(0.2)
result.get(30)
pool.join()
"""


@needs_root
@pytest.mark.parametrize("method", METHODS)
def test_tasks_wait_until_a_process_can_be_started(package: str, method: str) -> None:
    """The thread died: the pool waited for ever. Each attempt left four descriptors open."""
    output, errors = run_crowded(BEGINS + WAITS, method, package)
    assert output == "False True\n[0, 1, 2, 3]\n"
    assert not errors or method == "forkserver"  # which prints why it dies


@needs_root
@pytest.mark.parametrize("method", METHODS)
def test_the_pool_ends_where_no_process_can_be_started(package: str, method: str) -> None:
    output, errors = run_crowded(BEGINS + ENDS, method, package)
    assert output == ""
    assert not errors or method == "forkserver"


@pytest.mark.parametrize("method", METHODS)
def test_it_tries_again_at_the_descriptor_limit(package: str, method: str) -> None:
    ends(_replace_at_the_limit, package, method)


def _replace_at_the_limit(package: str, method: str) -> None:
    with get_context(method, backend=package).Pool(1, maxtasksperchild=1) as pool:
        first = pool.apply(os.getpid)
        # Else the descriptors of the first worker are closed below, and make room.
        wait_until(lambda: [worker.pid for worker in pool._pool] not in ([], [first]))
        with descriptor_limit_reached():
            result = pool.apply_async(abs, (-1,))
            later = pool.apply_async(abs, (-2,))
            later.wait(0.5)
            assert not later.ready()
        assert (result.get(30), later.get(30)) == (1, 2)
