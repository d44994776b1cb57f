"""The two packages, as the rest of mp/ sees them."""

from __future__ import annotations

import pickle

import pytest

from fdshare.mp.backends import backend_of
from fdshare.mp.family import Family
from mp.common import PACKAGES


@pytest.fixture(params=PACKAGES)
def family(request: pytest.FixtureRequest) -> Family:
    return backend_of(request.param).FAMILY


def test_it_is_pickled_by_its_name(family: Family) -> None:
    assert pickle.loads(pickle.dumps(family)) is family


def test_nobody_is_spawning(family: Family) -> None:
    assert not family.is_spawning
