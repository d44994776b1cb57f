"""What the tests of watches share: a table that changes, and who checks that nothing is missed."""

from __future__ import annotations

import os
import random
import signal
from typing import Any

from fdshare.client.blocking.client import Client
from fdshare.protocol import messages as m


def churn(client: Client, obj: Any, seed: int, steps: int) -> None:
    """Changes the table at random; ends with one last entry, named "end"."""
    choose = random.Random(seed)
    for _ in range(steps):
        name = f"n{choose.randrange(8)}"
        match choose.randrange(4):
            case 0 | 1:
                client.register(name, obj, replace=True)
            case 2 if name in client:
                client.unregister(name)
            case 3 if name in client:
                client.take_raw(name)[0].close()
    client.register("end", obj)


class Follower:
    """Checks each item of a watch of all names as it comes."""

    def __init__(self) -> None:
        self.serial: int | None = None
        self.table: dict[str, int] = {}

    def follow(self, change: Any) -> bool:
        """True once "end" is there."""
        if change.event == "snapshot":
            assert self.serial is None, "one snapshot is enough while nothing breaks"
            self.table = dict(change.entries)
        else:
            assert self.serial is not None
            assert change.serial == self.serial + 1, "none is missing, none comes twice"
            self._apply(change)
        self.serial = change.serial
        return "end" in self.table

    def _apply(self, event: m.Event) -> None:
        match event.event:
            case "registered":
                assert event.name not in self.table
                self.table[event.name] = event.generation
            case "replaced":
                assert self.table[event.name] < event.generation
                self.table[event.name] = event.generation
            case _:
                assert self.table.pop(event.name) == event.generation


def kill_and_change(address: str, obj: Any) -> None:
    """Kills the server again and again, and changes the table in between; the last entry is
    "end"."""
    with Client(address) as client:
        for i in range(4):  # with the fifth its keeper would take it for a crash loop
            client.register(f"n{i % 3}", obj, replace=True)
            os.kill(client.stats().server_pid, signal.SIGKILL)
            client.register(f"m{i}", obj)
            if i % 2:
                client.unregister(f"n{i % 3}")
        client.register("end", obj)
