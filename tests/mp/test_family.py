"""The two packages, and our classes over them."""

from __future__ import annotations

import pickle

import pytest

from fdshare.mp.family import Family, family_of
from mp.common import PACKAGES

LATE = (
    "CallQueue",
    "ManagerConnection",
    "OutcomeQueue",
    "Pool",
    "ResultQueue",
    "ResultReader",
    "SyncManager",
    "TaskQueue",
)


@pytest.fixture(params=PACKAGES)
def family(request: pytest.FixtureRequest) -> Family:
    return family_of(request.param)


def test_there_is_one_of_each(family: Family) -> None:
    assert family_of(family.package) is family
    assert pickle.loads(pickle.dumps(family)) is family
    with pytest.raises(ValueError, match="it may be one of"):
        family_of("threading")


def test_every_class_can_be_pickled_by_its_name(family: Family) -> None:
    classes = [value for value in vars(family.classes).values() if isinstance(value, type)]
    classes = [cls for cls in classes if cls.__module__ == family.home]
    classes += [getattr(family.classes, name) for name in LATE]
    assert len(classes) > 20
    for cls in classes:
        assert pickle.loads(pickle.dumps(cls)) is cls
        assert family.package in {base.__module__.partition(".")[0] for base in cls.__mro__} or (
            cls.__name__ == "CallQueue"  # concurrent.futures has one for both
        )


def test_what_there_is_not(family: Family) -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        family.classes.Nothing  # noqa: B018


def test_nobody_is_spawning(family: Family) -> None:
    assert family.spawning is None
