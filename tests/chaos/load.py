"""A client at full speed, run as a process: PATH WORKER SEED. The only one that changes the names
under WORKER/, so it knows after each answer what must be there.

Writes a byte to standard output for each operation, ends when standard input does, and then prints
its ledger to standard error: one line of JSON, or the first thing that was wrong.
"""

from __future__ import annotations

import json
import os
import random
import select
import sys
import traceback
from collections import Counter
from typing import Any

from fdshare.client.blocking.client import Client
from fdshare.errors import FetchTimeout, GenerationMismatch, NameNotFound, NameTaken
from fdshare.kernel.descriptor import Descriptor

MOST = 40  # names of one worker


class Wrong(Exception):
    """What no server may do."""


class Worker:
    def __init__(self, client: Client, name: str, seed: int) -> None:
        self.client = client
        self.name = name
        self.random = random.Random(f"{seed} {name}")
        self.table: dict[str, tuple[int, int, str]] = {}
        self.generations: dict[str, int] = {}
        self.counts: Counter[str] = Counter()
        self._made = 0

    # What is held, and how it is known again.

    def thing(self) -> tuple[Descriptor, tuple[int, int, str]]:
        """A memfd that says which it is, and what will be seen of it."""
        self._made += 1
        token = f"{self.name} {self._made}"
        descriptor = Descriptor(os.memfd_create("thing"))
        os.pwrite(descriptor.fileno(), token.encode(), 0)
        return descriptor, seen(descriptor)

    def check(self, name: str, descriptors: list[Descriptor]) -> None:
        (descriptor,) = descriptors
        with descriptor:
            if seen(descriptor) != self.table[name]:
                raise Wrong(f"{name} is {seen(descriptor)}, not {self.table[name]}")

    def some(self) -> str | None:
        return self.random.choice(list(self.table)) if self.table else None

    def fresh(self) -> str:
        return f"{self.name}/{self.random.randrange(10**9)}"

    def note(self, name: str, what: tuple[int, int, str], generation: int) -> None:
        if generation <= max(self.generations.values(), default=0):
            raise Wrong(f"{name} got generation {generation} again")
        self.table[name] = what
        self.generations[name] = generation

    # The operations.

    def register(self) -> None:
        name = self.fresh()
        descriptor, what = self.thing()
        with descriptor:
            self.note(name, what, self.client.register(name, descriptor).generation)

    def replace(self, name: str) -> None:
        descriptor, what = self.thing()
        with descriptor:
            if self.random.random() < 0.5:
                entry = self.client.register(name, descriptor, replace=True)
            else:
                now = self.generations[name]
                entry = self.client.register(name, descriptor, if_generation=now)
        self.note(name, what, entry.generation)

    def rename(self, name: str) -> None:
        new = self.fresh()
        entry = self.client.rename(name, new)
        what = self.table.pop(name)
        del self.generations[name]
        self.note(new, what, entry.generation)

    def take(self, name: str) -> None:
        self.check(name, self.client.take_raw(name))
        self.forget(name)

    def unregister(self, name: str) -> None:
        self.client.unregister(name)
        self.forget(name)

    def forget(self, name: str) -> None:
        del self.table[name], self.generations[name]

    def fetch(self, name: str) -> None:
        self.check(name, self.client.fetch_raw(name))

    def refuse(self, name: str) -> None:
        """What must be refused is."""
        descriptor, _ = self.thing()
        with descriptor:
            try:
                self.client.register(name, descriptor)
                raise Wrong(f"{name} was registered twice")
            except NameTaken as error:
                if error.generation != self.generations[name]:
                    raise Wrong(f"{error} but {self.generations[name]} was acknowledged") from None
            try:
                self.client.register(name, descriptor, if_generation=0)
                raise Wrong(f"{name} was registered twice")
            except GenerationMismatch:
                pass

    def miss(self, name: str) -> None:
        try:
            self.client.fetch_raw(self.fresh())
            raise Wrong("a name that was never registered is there")
        except NameNotFound:
            pass
        try:
            self.client.fetch_raw(self.fresh(), timeout=0.01)
            raise Wrong("a name that was never registered is there")
        except FetchTimeout:
            pass

    def look(self, name: str) -> None:
        names = self.client.names(f"{self.name}/*")
        if names != sorted(self.table):
            raise Wrong(f"{set(names) ^ set(self.table)} differ")

    def tell(self, name: str) -> None:
        info = self.client.info(name)
        if (info.generation, info.count) != (self.generations[name], 1):
            raise Wrong(f"{name} is {info}")

    def bind(self, name: str) -> None:
        """Twice, and it is the same; no other socket is left behind."""
        name = self.fresh()
        address = "tcp://127.0.0.1:0"
        with self.client.bind(name, address) as first, self.client.bind(name, address) as second:
            if first.getsockname() != second.getsockname():
                raise Wrong(f"{name} was bound twice")
        self.client.unregister(name)

    def step(self) -> None:
        name = self.some()
        if name is None or len(self.table) < MOST // 2:
            verb = "register"
        else:
            verbs = ["replace", "take", "unregister", "rename", "fetch", "fetch"]
            verbs += ["refuse", "miss", "look", "tell", "bind"]
            verb = self.random.choice(verbs + ["register"] * (len(self.table) < MOST))
        self.counts[verb] += 1
        if verb == "register":
            self.register()
        else:
            getattr(self, verb)(name)


def seen(descriptor: Descriptor) -> tuple[int, int, str]:
    info = os.fstat(descriptor.fileno())
    return info.st_dev, info.st_ino, os.pread(descriptor.fileno(), 100, 0).decode()


def main(path: str, name: str, seed: int) -> dict[str, Any]:
    with Client(path) as client:
        worker = Worker(client, name, seed)
        worker.step()
        before = len(os.listdir("/proc/self/fd"))
        while not select.select([0], [], [], 0)[0]:
            worker.step()
            os.write(1, b".")
        after = len(os.listdir("/proc/self/fd"))
        if after > before + 1:  # the connection may be between two servers
            raise Wrong(f"{after - before} descriptors were leaked")
    return {
        "table": worker.table,
        "generations": worker.generations,
        "counts": worker.counts,
    }


if __name__ == "__main__":
    try:
        ledger = main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
        print(json.dumps(ledger), file=sys.stderr)
    except BaseException:
        print(json.dumps({"wrong": traceback.format_exc()}), file=sys.stderr)
        sys.exit(1)
