"""What the tests of clients share: files that can be told apart, and a pipe."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def files(folder: Path) -> Iterator[list[Any]]:
    files = [open(folder / str(number), "w+") for number in range(4)]
    yield files
    for file in files:
        file.close()


@pytest.fixture
def pipe() -> Iterator[int]:
    """The reading end of a pipe."""
    ends = os.pipe()
    yield ends[0]
    for end in ends:
        os.close(end)


def inode(obj: Any) -> int:
    """Which file it is."""
    return os.fstat(obj.fileno()).st_ino
