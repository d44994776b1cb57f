"""Compiles what hundreds of processes import, once, also where no bytecode may be written
(PYTHONDONTWRITEBYTECODE)."""

from __future__ import annotations

import compileall
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
IMPORTED = ("fdshare", "tests", "benchmarks")


def compile_all() -> None:
    """Compiles the package, and what children of tests import, as it stands."""
    for folder in IMPORTED:
        compileall.compile_dir(TESTS.parent / folder, quiet=2)


def import_share(session: pytest.Session) -> None:
    """Imports the share of this worker of xdist in the tests that it is about to collect.

    pytest rewrites their asserts, which takes longer than everything else that is done to collect
    them, and keeps what it has rewritten. So no file is rewritten by every worker."""
    worker = getattr(session.config, "workerinput", None)
    if worker is None:
        return
    sys.dont_write_bytecode = False
    files = sorted(set(files_of(session.config)))
    for path in files[int(worker["workerid"].removeprefix("gw")) :: worker["workercount"]]:
        try:
            importlib.import_module(".".join(path.relative_to(TESTS).with_suffix("").parts))
        except (Exception, pytest.skip.Exception):
            pass  # to collect it says so again


def files_of(config: pytest.Config) -> Iterator[Path]:
    """The files of tests in the packages that the command line names."""
    left_out = {*config.getini("norecursedirs")}
    for word in config.args:
        given = (config.invocation_params.dir / word.partition("::")[0]).resolve()
        for path in [given] if given.is_file() else given.rglob("test_*.py"):
            package = path.parent == TESTS or (path.parent / "__init__.py").exists()
            asked = not left_out & {*path.relative_to(given).parent.parts}
            if package and asked and path.is_relative_to(TESTS):
                yield path
