"""The check of import circles: it finds those that are put in."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import import_cycles
import pytest


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package of three modules that import each other in a row, and of a fourth."""
    monkeypatch.syspath_prepend(tmp_path)
    folder = tmp_path / "in_a_row"
    (folder / "inner").mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "inner/__init__.py").write_text("")
    (folder / "first.py").write_text("from in_a_row import second\n")
    (folder / "second.py").write_text("from in_a_row.inner.third import value\n")
    (folder / "inner/third.py").write_text("value = 1\n")
    (folder / "fourth.py").write_text("from in_a_row import first, second\n")
    yield folder
    sys.modules.pop("in_a_row", None)


def find(package: Path) -> list[str]:
    return import_cycles.find_cycle(import_cycles.import_graph(package.name))


def test_none(package: Path) -> None:
    assert find(package) == []


@pytest.mark.parametrize(
    "back",
    [
        "from in_a_row.first import something",
        "from .. import first",
        "def function():\n    import in_a_row.first",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from in_a_row.first import Type",
    ],
)
def test_a_circle_of_three(package: Path, back: str) -> None:
    (package / "inner/third.py").write_text(back + "\n")
    found = find(package)
    assert found[0] == found[-1]
    row = ["in_a_row.first", "in_a_row.second", "in_a_row.inner.third"]
    assert set(found) == set(row)
    for importer, imported in itertools.pairwise(found):
        assert row[(row.index(importer) + 1) % 3] == imported


def test_a_package_and_a_module_in_it(package: Path) -> None:
    (package / "inner/__init__.py").write_text("def function():\n    from . import third\n")
    (package / "inner/third.py").write_text("from in_a_row import inner\n")
    assert set(find(package)) == {"in_a_row.inner", "in_a_row.inner.third"}


def test_importlib_is_noticed(package: Path) -> None:
    (package / "inner/third.py").write_text("def f():\n    from importlib import import_module\n")
    assert import_cycles.users_of_importlib("in_a_row") == {"in_a_row.inner.third"}
