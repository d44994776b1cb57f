"""What holds for every test: no descriptor more after it than before, and no process left behind."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest


def census(pid: int | str = "self") -> dict[int, str]:
    """What /proc says that *pid* has open: number -> target. The listing's own is left out."""
    table = {}
    for number in os.listdir(f"/proc/{pid}/fd"):
        try:
            table[int(number)] = os.readlink(f"/proc/{pid}/fd/{number}")
        except FileNotFoundError:
            continue
    return table


@pytest.fixture(autouse=True)
def descriptors_counted() -> Iterator[None]:
    """Fails a test that leaves descriptors open in this process."""
    gc.collect()
    before = census()
    yield
    # What another thread is about to close gets a moment; a leak stays.
    deadline = time.monotonic() + 2
    while True:
        gc.collect()
        after = census()
        left = {fd: target for fd, target in after.items() if before.get(fd) != target}
        if len(after) <= len(before) or time.monotonic() > deadline:
            break
        os.sched_yield()
    assert len(after) <= len(before), f"descriptors left open: {left}"


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short path: pytest's own are longer than sun_path."""
    path = Path(tempfile.mkdtemp(prefix="fds-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)
