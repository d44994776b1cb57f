"""What the tests of the asynchronous client share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


@pytest.fixture
def pipe() -> Iterator[int]:
    """The reading end of a pipe."""
    ends = os.pipe()
    yield ends[0]
    for end in ends:
        os.close(end)
