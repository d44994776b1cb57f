"""Histories of followers under kill -9 of either half, upgrade and reload: once a change has been
acknowledged, no reader sees what was there before, and none goes back."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from breaking import Halves, kill
from conftest import wait_until

from chaos.histories import NAME, REMOVED, wrong
from chaos.test_kill_under_load import Load
from fdshare.manager import Manager

PROGRAM = Path(__file__).with_name("histories.py")
WORDS = ("w0", "w1", "r0", "r1")


@pytest.fixture
def manager(fresh: None) -> Iterator[Manager]:
    with Manager() as manager:
        fd = os.memfd_create("history")
        os.write(fd, b"-1")
        manager.register(NAME, fd)
        os.close(fd)
        yield manager


@pytest.fixture
def workers(manager: Manager, seed: int) -> Iterator[Load]:
    load = Load(manager.address, seed, PROGRAM, WORDS)
    yield load
    load.end()


ACTIONS = ["server", "keeper", "upgrade", "reload"]


@pytest.mark.parametrize("actions", [*([each] for each in ACTIONS), ACTIONS], ids="+".join)
def test_every_history_has_an_order(
    actions: list[Any],
    manager: Manager,
    workers: Load,
    times: Callable[[int], int],
    seed: int,
    counted: dict[str, Any],
) -> None:
    chance = random.Random(seed)
    done: Counter[str] = Counter()
    halves = Halves(manager)
    workers.progress(50)
    # Five deaths of the same half in ten seconds are answered by a pause of five.
    while done.total() < times(4 if len(actions) == 1 else 12):
        action = chance.choice(actions)
        done[action] += 1
        if action == "upgrade":
            manager.upgrade()
        elif action == "reload":
            manager.reload()
        else:
            halves.redundant()
            victim = halves.pids()[action]
            kill(victim)
            wait_until(lambda action=action, pid=victim: halves.pids()[action] != pid)
        workers.progress(chance.randrange(1, 200))
    ledgers = workers.ledgers()
    assert [ledger["wrong"] for ledger in ledgers if "wrong" in ledger] == []
    writes = [write for ledger in ledgers for write in ledger.get("writes", ())]
    reads = [run for ledger in ledgers for run in ledger.get("reads", ())]
    absent = [read for ledger in ledgers for read in ledger.get("absent", ())]
    looks = sum(ledger.get("looks", 0) for ledger in ledgers)
    counted.update(done, writes=len(writes), runs=len(reads), looks=looks, absent=len(absent))
    assert writes
    assert reads
    first = [-1, 1, 0, 0]  # registered before the history begins
    assert wrong([first, *writes], reads, absent) == []


# The checker finds what is wrong.

WRITES = [[10, 1, 0, 10], [20, 2, 100, 110], [REMOVED, 2.5, 150, 160], [30, 3, 200, 210]]


@pytest.mark.parametrize(
    "reads",
    [
        [[10, 5, 6, 105, 106], [20, 104, 105, 155, 156], [30, 215, 216, 300, 301]],
        [[10, 105, 120, 105, 120], [20, 109, 111, 159, 220]],
        [[10, 105, 106, 105, 106], [20, 105, 106, 105, 106]],
    ],
)
def test_a_history_that_has_an_order(reads: list[list[int]]) -> None:
    assert wrong(WRITES, reads) == []


@pytest.mark.parametrize(
    "reads",
    [
        [[20, 50, 60, 50, 60]],  # before it was written
        [[10, 5, 6, 111, 112]],  # after the next was acknowledged
        [[10, 5, 6, 50, 60], [10, 115, 116, 115, 116]],
        [[30, 201, 202, 201, 202], [20, 204, 205, 204, 205]],  # back again
        [[20, 115, 116, 161, 162]],  # after it was removed
    ],
)
def test_a_history_that_has_none(reads: list[list[int]]) -> None:
    assert wrong(WRITES, reads) != []


def test_a_name_that_was_missing() -> None:
    assert wrong(WRITES, [], [[155, 156], [205, 206], [149, 151]]) == []
    for read in ([120, 130], [211, 212]):
        assert wrong(WRITES, [], [read]) != []
    assert wrong(WRITES, [[30, 201, 202, 201, 202]], [[203, 204]]) != []
