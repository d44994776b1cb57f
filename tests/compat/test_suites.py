"""The part of CPython's own tests that is about what we replace, each time; all: docs/compat.md.

stdlib_suite.py and futures_suite.py run the whole, some minutes for each start method.
"""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CLASSES = (
    "WithProcessesTestConnection",
    "WithProcessesTestListener",
    "WithProcessesTestPicklingConnections",
    "WithProcessesTestPoll",
    "WithProcessesTestQueue",
    "TestSimpleQueue",
)


def run(*command: str) -> int:
    """How many tests passed; fails with what they said if one did not."""
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    ran = re.search(r"Ran (\d+) tests", done.stderr)
    assert ran is not None
    return int(ran[1])


@pytest.mark.skipif(find_spec("test._test_multiprocessing") is None, reason="Python without tests")
def test_multiprocessings_own_tests() -> None:
    chosen = [word for name in CLASSES for word in ("-k", name)]
    assert run(str(HERE / "stdlib_suite.py"), "fork", *chosen) > 20


def _has_futures_tests() -> bool:
    try:
        return find_spec("test.test_concurrent_futures.util") is not None
    except ModuleNotFoundError:
        return False


@pytest.mark.skipif(not _has_futures_tests(), reason="Python without these tests")
def test_concurrent_futures_own_tests() -> None:
    chosen = ["-k", "ProcessPoolForkProcessPoolExecutorTest", "-k", "ProcessPoolForkWaitTest"]
    assert run(str(HERE / "futures_suite.py"), *chosen) > 10
