"""What several files of tests of the examples share."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

PROGRAMS = Path(__file__).parents[2] / "examples"
Started = subprocess.Popen[str]
Start = Callable[..., Started]
SOURCES = PROGRAMS / "classic" / "c"


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a program of examples/."""
    started: list[Started] = []

    def start(name: str, *arguments: object) -> Started:
        process = subprocess.Popen(
            [sys.executable, str(PROGRAMS / name), *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


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
