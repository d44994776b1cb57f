"""kill -9 of either half at random moments, under load: nothing that was acknowledged is lost,
nothing comes back, no client sees an error."""

from __future__ import annotations

import json
import os
import random
import select
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from breaking import Halves, identity, kill
from conftest import wait_until

from fdshare.client.blocking.client import Client
from fdshare.manager import Manager

pytestmark = pytest.mark.usefixtures("fresh")

LOAD = Path(__file__).with_name("load.py")
WORKERS = ("w0", "w1", "w2", "w3")


class Load:
    """The workers, which run *program*. What each says when it ends is its ledger."""

    def __init__(
        self, address: str, seed: int, program: Path = LOAD, words: Sequence[str] = WORKERS
    ) -> None:
        self.processes = [
            subprocess.Popen(
                [sys.executable, str(program), address, word, str(seed)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            for word in words
        ]
        self.done = 0

    def progress(self, steps: int) -> None:
        """Returns when the workers have done *steps* more, or one of them has failed."""
        wanted = self.done + steps
        deadline = time.monotonic() + 60
        pipes = select.poll()
        for process in self.processes:
            assert process.stdout is not None
            pipes.register(process.stdout, select.POLLIN)
        while self.done < wanted:
            ready = pipes.poll(max(deadline - time.monotonic(), 0) * 1000)
            assert ready, "the workers do not get on"
            for fd, _ in ready:
                data = os.read(fd, 1 << 16)
                if not data:  # it has something to say
                    return
                self.done += len(data)

    def ledgers(self) -> list[dict[str, Any]]:
        """Ends the workers."""
        ledgers = []
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.close()
            process.stdin = None
        for process in self.processes:
            _, said = process.communicate(timeout=60)
            ledgers.append(json.loads(said.splitlines()[-1]))
        return ledgers

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()


class Waiting:
    """Two that wait from before the first death to after the last: for a name, and for events."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._found: list[tuple[int, int]] = []
        self._held: dict[str, int] = {}
        self._changes = 0
        self._failures: list[BaseException] = []
        tasks = (self._wait, self._watch)
        self._threads = [threading.Thread(target=self._run, args=(task,)) for task in tasks]

    def __enter__(self) -> Waiting:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        for thread in self._threads:
            thread.join(0 if exc[0] else 30)

    def _run(self, task: Callable[[Client], None]) -> None:
        try:
            with Client(self._address) as client:
                task(client)
        except BaseException as error:
            self._failures.append(error)

    def _wait(self, client: Client) -> None:
        with client.fetch_raw("at the end", timeout=600)[0] as descriptor:
            self._found.append(identity(descriptor))

    def _watch(self, client: Client) -> None:
        with client.watch(timeout=600) as watch:
            for _ in watch:
                self._changes += 1
                if "at the end" in watch.held:
                    self._held = dict(watch.held)
                    return

    def end(self, client: Client) -> None:
        """What they wait for has come, and they have seen it."""
        null = os.open(os.devnull, os.O_RDONLY)
        table = {e.name: e.generation for e in client.infos()}
        entry = client.register("at the end", null)
        for thread in self._threads:
            thread.join(30)
        assert not self._failures, self._failures
        assert self._found == [identity(null)]
        assert self._held == {**table, "at the end": entry.generation}
        client.unregister("at the end")
        os.close(null)


@pytest.fixture
def load() -> Iterator[Callable[[str, int], Load]]:
    started: list[Load] = []

    def start(address: str, seed: int) -> Load:
        started.append(Load(address, seed))
        return started[-1]

    yield start
    for one in started:
        one.end()


@pytest.mark.parametrize("victims", [["server"], ["keeper"], ["server", "keeper"]], ids="+".join)
def test_kill_under_load(
    victims: list[Any],
    load: Callable[[str, int], Load],
    times: Callable[[int], int],
    seed: int,
    counted: dict[str, Any],
) -> None:
    chance = random.Random(seed)
    kills: Counter[str] = Counter()
    with (
        Manager() as manager,
        Client(manager.address) as watcher,
        watcher.watch() as watch,
        Waiting(manager.address) as waiting,
    ):
        halves = Halves(manager)
        workers = load(manager.address, seed)
        workers.progress(500)
        # Five deaths of the same half in ten seconds are answered by a pause of five.
        wanted = times(8 if len(victims) == 1 else 50)
        while kills.total() < wanted and all(p.poll() is None for p in workers.processes):
            halves.redundant()
            half = chance.choice(victims)
            victim = halves.pids()[half]
            workers.progress(chance.randrange(1, 200))
            kill(victim)
            kills[half] += 1
            wait_until(lambda half=half, pid=victim: halves.pids()[half] != pid)
        workers.progress(200)
        ledgers = workers.ledgers()
        counted.update(kills, operations=workers.done)
        wrong = [ledger["wrong"] for ledger in ledgers if "wrong" in ledger]
        assert not wrong, "\n".join(wrong)
        for ledger in ledgers:
            for verb, count in ledger["counts"].items():
                counted[verb] = counted.get(verb, 0) + count
        compare(manager, ledgers)
        waiting.end(manager)
        table = {e.name: e.generation for e in manager.infos()}
        while watch.held != table:
            next(watch)
        watch.close()
        watcher.close()
        halves.check_census()


def compare(client: Client, ledgers: list[dict[str, Any]]) -> None:
    """The table against what was acknowledged, descriptor by descriptor."""
    expected = {n: what for ledger in ledgers for n, what in ledger["table"].items()}
    generations = {n: g for ledger in ledgers for n, g in ledger["generations"].items()}
    assert sorted(client.names()) == sorted(expected)
    assert {e.name: e.generation for e in client.infos()} == generations
    for name, descriptor in client.fetch_many(expected).items():
        with descriptor:
            info = os.fstat(descriptor.fileno())
            content = os.pread(descriptor.fileno(), 100, 0).decode()
            assert [info.st_dev, info.st_ino, content] == expected[name]
