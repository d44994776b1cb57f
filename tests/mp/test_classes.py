"""Our classes over both packages: each is found in our module by the name that pickles have."""

from __future__ import annotations

import pickle
import subprocess
import sys
from functools import cached_property

import pytest

from fdshare.mp.backends import Backend, backend_of
from fdshare.mp.classes import Classes
from mp.common import PACKAGES

NAMES = [name for name, value in vars(Classes).items() if isinstance(value, cached_property)]


@pytest.fixture(params=PACKAGES)
def backend(request: pytest.FixtureRequest) -> Backend:
    return backend_of(request.param)


def test_every_class_can_be_pickled_by_its_name(backend: Backend) -> None:
    family = backend.FAMILY
    made = [getattr(backend.CLASSES, name) for name in NAMES]
    classes = [cls for cls in made if isinstance(cls, type)]
    classes += [type(context) for context in backend.CONTEXTS.values()]
    assert len(classes) > 20
    for cls in classes:
        assert cls.__module__ == family.home
        assert pickle.loads(pickle.dumps(cls)) is cls
        assert family.package in {base.__module__.partition(".")[0] for base in cls.__mro__} or (
            cls.__name__ == "CallQueue"  # concurrent.futures has one for both
        )


@pytest.mark.parametrize("package", PACKAGES)
def test_a_process_that_has_none_of_them_finds_each(package: str) -> None:
    home = f"fdshare.mp.on_{package}"
    code = (
        "import importlib\n"
        f"home = importlib.import_module({home!r})\n"
        f"for name in {NAMES}:\n"
        "    assert getattr(home, name).__qualname__.rpartition('.')[2] == name\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_name_that_no_class_has(backend: Backend) -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        backend.Nothing  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute '_queue'"):
        backend._queue  # type: ignore[attr-defined]  # noqa: B018
