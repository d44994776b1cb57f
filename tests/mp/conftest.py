"""A channel without a channel around it, for the tests of messages."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest
from common import READERS, Pair, Read


@pytest.fixture
def pair() -> Iterator[Pair]:
    left, right = socket.socketpair()
    with left, right:
        yield left, right


@pytest.fixture
def null() -> Iterator[int]:
    fd = os.open(os.devnull, os.O_RDONLY)
    yield fd
    os.close(fd)


@pytest.fixture(params=READERS)
def read(request: pytest.FixtureRequest) -> Read:
    """Whatever comes, it makes no difference what was expected."""
    return request.param  # type: ignore[no-any-return]
