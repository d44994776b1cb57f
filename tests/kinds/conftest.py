"""A file and a pipe to share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def path(folder: Path) -> Path:
    path = folder / "data"
    path.write_bytes(b"".join(b"line %d\n" % n for n in range(2000)))
    return path


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        try:
            os.close(end)
        except OSError:
            pass
