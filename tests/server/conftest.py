"""What the tests of servers with both halves share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
from breaking import Half, Halves
from nursery import Manager


@pytest.fixture(scope="module")
def shared() -> Iterator[Manager]:
    with Manager() as manager:
        yield manager


@pytest.fixture
def manager(shared: Manager) -> Iterator[Manager]:
    """A server with both halves, empty and accounted for after the test."""
    with Manager(shared.address).connect() as manager:  # connections of the test's own
        yield manager
        for name in manager.names():
            manager.unregister(name)
        Halves(manager).redundant()
        Halves(manager).check_census()


@pytest.fixture
def break_(manager: Manager) -> Callable[[list[Half]], None]:
    def break_(order: list[Half]) -> None:
        for half in order:
            Halves(manager).kill(half)

    return break_


@pytest.fixture
def fd() -> Iterator[int]:
    fd = os.memfd_create("held")
    yield fd
    os.close(fd)
