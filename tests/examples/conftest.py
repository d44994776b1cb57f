"""What several files of tests of the examples share."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "examples" / "classic" / "c"


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the programs that `make` has made, without a warning."""
    if shutil.which("make") is None or shutil.which("cc") is None:
        pytest.skip("no make, or no C compiler")
    built = tmp_path_factory.mktemp("classic") / "c"
    shutil.copytree(SOURCES, built)
    flags = "CFLAGS=-O2 -Wall -Wextra -Werror -pedantic"
    subprocess.run(["make", "--silent", "--always-make", flags], cwd=built, check=True)
    return built
