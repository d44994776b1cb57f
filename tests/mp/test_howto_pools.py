"""docs/howto/pools.md: each program on the page runs, and says what it should."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "pools.md"
PROGRAMS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)

SAID = [
    "27 characters\n",
    "from a worker\n",
    "127.0.0.1\n",
    "loky alone leaks 9 of 9\nheld leaks 0 of 9\n",
    "leaks 0 of 5\n",
    "abc def ghi\n",
]


def test_each_program_is_known() -> None:
    assert len(PROGRAMS) == len(SAID)


@pytest.mark.parametrize(("program", "said"), list(zip(PROGRAMS, SAID, strict=False)))
def test_a_program_of_the_page(program: str, said: str, folder: Path) -> None:
    for needed in re.findall(r"^# needs (\w+)", program):
        if find_spec(needed) is None:
            pytest.skip(f"{needed} is not installed: pip install fdshare[compat]")
    path = folder / "program.py"
    path.write_text(program)
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout == said
