"""What tests of pickling share: a family, and a way through its channels or its patched ones."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import fdshare
from fdshare.mp.backends import backend_of
from fdshare.mp.family import Family
from fdshare.mp.pickling.reducers import dumps
from mp.common import PACKAGES

Through = Callable[[Any], Any]


@pytest.fixture(params=PACKAGES)
def family(request: pytest.FixtureRequest) -> Family:
    return backend_of(request.param).FAMILY


@pytest.fixture
def armed() -> Iterator[None]:
    fdshare.install()
    yield
    fdshare.uninstall()


@pytest.fixture(params=["ours", "installed"])
def through(request: pytest.FixtureRequest, family: Family) -> Iterator[Through]:
    """What arrives of an object."""
    if request.param == "ours":
        yield lambda obj: dumps(family, obj).own().load(family.loads)
        return
    fdshare.install()
    yield lambda obj: pickle.loads(family.ForkingPickler.dumps(obj))
    fdshare.uninstall()
