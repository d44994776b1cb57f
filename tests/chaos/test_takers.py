"""Takers that die at every point of a take, while halves do: what was confirmed is gone for good,
all else is back under its name with its generation."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Literal

import pytest
from breaking import Half, Halves, Wire, identity
from conftest import wait_until

from fdshare.kernel.descriptor import Descriptor
from fdshare.manager import Manager
from fdshare.protocol import messages as m

pytestmark = pytest.mark.usefixtures("fresh")

End = Literal["unsent", "unread", "half read", "unconfirmed", "confirmed", "confirmed, gone"]
ENDS: list[End] = ["unsent", "unread", "half read", "unconfirmed", "confirmed", "confirmed, gone"]


class Take:
    """One take that goes as far as *end*; `death` may come at any of its steps."""

    def __init__(self, address: str, end: End, death: Callable[[str], None]) -> None:
        self.end = end
        self.confirmed = False
        self.descriptors: list[Descriptor] = []
        self._death = death
        self._wire = Wire(address, "taker")

    def run(self) -> None:
        with self._wire, suppress(EOFError, ConnectionError):
            self._ask()
        self._death("at the end")

    def _ask(self) -> None:
        self._death("at the start")
        if self.end == "unsent":
            return
        self._wire.send(1, m.Take("a", 20.0))
        self._death("asked")
        if self.end == "unread":
            return
        if self.end == "half read":
            self._wire.sock.recv(1)  # without room for descriptors: they are gone
            return
        *self.descriptors, lease = self._wire.receive().descriptors
        with lease.socket() as sock:
            self._death("answered")
            if self.end == "unconfirmed":
                return
            sock.send(b"\1")
            self.confirmed = True
            if self.end == "confirmed, gone":
                return
        self._death("confirmed")

    def close(self) -> None:
        for descriptor in self.descriptors:
            descriptor.close()


def test_takers(times: Callable[[int], int], seed: int, counted: dict[str, Any]) -> None:
    chance = random.Random(seed)
    counts: Counter[str] = Counter()
    fd = os.memfd_create("taken")
    steps = ["at the start", "asked", "answered", "confirmed", "at the end", "never"]
    with Manager() as manager:
        halves = Halves(manager)
        for _ in range(times(150)):
            if "a" not in manager:
                manager.register("a", fd)
            generation = manager.info("a").generation
            when, half = chance.choice(steps), chance.choice(["server", "keeper"])

            def death(step: str, when: str = when, half: Half = half) -> None:  # type: ignore[assignment]
                if step == when:
                    counts[half] += 1
                    halves.kill(half)

            take = Take(manager.address, chance.choice(ENDS), death)
            take.run()
            counts[take.end] += 1
            if take.confirmed:
                assert identity(take.descriptors[0]) == identity(fd)
                assert manager.names() == []
                counts["gone"] += 1
            else:
                wait_until(lambda: manager.names() == ["a"], f"back after {take.end}, {when}")
                assert manager.info("a").generation == generation
                counts["back"] += 1
            take.close()
        counted.update(counts)
        wait_until(lambda: manager.stats().leases == 0)
        halves.redundant()
        halves.check_census()
    os.close(fd)
