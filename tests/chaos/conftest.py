"""The chaos runs: how long they are, the seeds they go by, and the counts they print.

FDSHARE_CHAOS=long runs ten times as much; FDSHARE_SEED=N repeats a run.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

LONG = os.environ.get("FDSHARE_CHAOS") == "long"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if LONG and item.path.parent.name == "chaos":
            item.add_marker(pytest.mark.timeout(1800), append=False)


@pytest.fixture
def times() -> Callable[[int], int]:
    """How often something is done: *n* in the default run, 10 * *n* in the long one."""
    return lambda n: n * 10 if LONG else n


@pytest.fixture
def seed() -> int:
    return int(os.environ.get("FDSHARE_SEED") or random.SystemRandom().randrange(2**32))


@pytest.fixture
def counted(
    request: pytest.FixtureRequest, record_property: Callable[[str, object], None], seed: int
) -> Iterator[dict[str, Any]]:
    """What the test counts, printed at the end of the run, whether it passed or not."""
    counts: dict[str, Any] = {"seed": seed}
    yield counts
    record_property("counted", ", ".join(f"{key} {value}" for key, value in counts.items()))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    lines = []
    for reports in terminalreporter.stats.values():
        for report in reports:
            for key, value in getattr(report, "user_properties", ()):
                if key == "counted" and report.when == "teardown":
                    lines.append(f"{report.nodeid.rpartition('/')[2]}: {value}")
    if lines:
        terminalreporter.section("what was broken")
        for line in sorted(lines):
            terminalreporter.write_line(line)
