"""docs/howto/troubleshooting.md: a section for each error, with the message that it has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from test_errors import LEAVES, make

from fdshare.errors import FdshareError

PAGE = Path(__file__).parent.parent / "docs" / "howto" / "troubleshooting.md"
SECTIONS = dict(re.findall(r"^### (\w+)\n\n`([^`]+)`", PAGE.read_text(), re.MULTILINE))
ERRORS = [cls for cls in LEAVES if cls is not FdshareError]


def test_each_error_has_its_section() -> None:
    assert sorted(SECTIONS) == sorted(cls.__name__ for cls in ERRORS)
    assert len(SECTIONS) == PAGE.read_text().count("\n### ")


@pytest.mark.parametrize("cls", ERRORS, ids=lambda cls: cls.__name__)
def test_the_message_is_the_one_it_has(cls: type[FdshareError]) -> None:
    shown = " ".join(SECTIONS[cls.__name__].split())
    pattern = re.escape(shown).replace(re.escape("..."), ".+")
    assert re.fullmatch(pattern, str(make(cls)))


@pytest.mark.parametrize("cls", ERRORS, ids=lambda cls: cls.__name__)
def test_its_docstring_names_the_section(cls: type[FdshareError]) -> None:
    assert f"docs/howto/{PAGE.name}#{cls.__name__.lower()}" in (cls.__doc__ or "")
