"""What the tests of channels share: the parent's side. (children.py is the other one's.)"""

from __future__ import annotations

import gc
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import pytest

PACKAGES = ("multiprocessing", "multiprocess")
METHODS = ("fork", "spawn", "forkserver")


@pytest.fixture(scope="session", autouse=True)
def trackers() -> None:
    """What multiprocessing starts once for a process, and keeps open, starts before counting."""
    for package in PACKAGES:
        import_module(f"{package}.resource_tracker").ensure_running()
        import_module(f"{package}.forkserver").ensure_running()
        import_module(f"{package}.heap").BufferWrapper(1)


def identity(obj: Any) -> tuple[int, int]:
    """Which file or socket it is."""
    status = os.fstat(obj.fileno())
    return status.st_dev, status.st_ino


def open_now() -> int:
    """How many descriptors this process has."""
    return len(os.listdir("/proc/self/fd"))


def finish(queue: Any) -> None:
    """Closes *queue*, sent or not."""
    queue.close()
    if hasattr(queue, "join_thread"):
        queue.join_thread()
    queue._reader.close()
    queue._writer.close()


@contextmanager
def descriptor_limit_reached() -> Iterator[None]:
    """No descriptor is free in this process."""
    gc.collect()  # or garbage of before makes room in between
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, os.listdir("/proc/self/fd")))
    fillers = []
    try:
        while not fillers or fillers[-1] < highest:
            fillers.append(os.open(os.devnull, os.O_RDONLY))
        resource.setrlimit(resource.RLIMIT_NOFILE, (fillers[-1] + 1, limits[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for filler in fillers:
            os.close(filler)
