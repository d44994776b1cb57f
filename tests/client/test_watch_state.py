"""The state of a watch, against a model; and watches over real servers that change, and die."""

from __future__ import annotations

import os
import random
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from nursery import Manager

import fdshare
from fdshare.client import watch_state as module
from fdshare.client.blocking.client import Client
from fdshare.client.watch_state import Snapshot, WatchState
from fdshare.errors import ClosedDescriptor
from fdshare.protocol import messages as m
from fdshare.protocol.names import matcher

NAMES = ["a", "b", "c", "x/a", "x/b"]


class WatchedTable(RuleBasedStateMachine):
    """A server with one table and one watch of it, whose connection and patience may break."""

    def __init__(self) -> None:
        super().__init__()
        self.pattern = "x/*"
        self.matches = matcher(self.pattern)
        self.table: dict[str, int] = {}
        self.serial = 0
        self.watching = WatchState(self.pattern)
        self.answered = False  # the watch has its snapshot
        self.known = 0  # the serial of the last snapshot
        self.seen = 0  # the serial of what was drawn last

    def change(self, event: m.EventKind, name: str, old: str = "") -> None:
        self.serial += 1
        if self.answered:
            self.watching.event(m.Event(self.serial, event, name, self.serial, old))

    @rule(name=st.sampled_from(NAMES))
    def register(self, name: str) -> None:
        self.change("replaced" if name in self.table else "registered", name)
        self.table[name] = self.serial

    @rule(name=st.sampled_from(NAMES), event=st.sampled_from(["taken", "unregistered", "expired"]))
    def remove(self, name: str, event: m.EventKind) -> None:
        if self.table.pop(name, None) is not None:
            self.change(event, name)

    @rule(old=st.sampled_from(NAMES), new=st.sampled_from(NAMES))
    def rename(self, old: str, new: str) -> None:
        if old in self.table and new not in self.table:
            del self.table[old]
            self.change("registered", new, old)
            self.table[new] = self.serial

    @rule(cut=st.integers(0, 5))
    def answer(self, cut: int) -> None:
        """The snapshot, in two parts."""
        visible = [(n, g) for n, g in self.table.items() if self.matches(n)]
        self.watching.snapshot(m.SnapshotPart(self.serial, dict(visible[:cut]), True))
        self.watching.snapshot(m.SnapshotPart(self.serial, dict(visible[cut:]), False))
        self.answered, self.known = True, self.serial

    @rule()
    def break_off(self) -> None:
        """The connection ends, in the middle of an answer."""
        self.watching.snapshot(m.SnapshotPart(self.serial, {"x/ghost": 1}, True))
        self.watching.lost()
        self.answered = False

    @rule()
    def overflow(self) -> None:
        self.watching.overflowed()
        self.answered = False

    @precondition(lambda self: self.answered)
    @rule()
    def old_events_do_not_count(self) -> None:
        assert not self.watching.event(m.Event(self.known, "registered", "x/old", 1))

    @rule(most=st.integers(1, 4))
    def draw(self, most: int) -> None:
        for _ in range(most):
            change = self.watching.draw()
            if change is None:
                return
            assert change.serial > self.seen or isinstance(change, Snapshot)
            self.seen = change.serial
            if isinstance(change, m.Event):
                assert self.matches(change.name)

    @invariant()
    def converges(self) -> None:
        """Whoever draws all there is knows what is held."""
        if self.answered and not self.watching._queue:
            held = {n: g for n, g in self.table.items() if self.matches(n)}
            assert self.watching.held == held

    def teardown(self) -> None:
        self.answer(2)
        while self.watching.draw() is not None:
            pass
        self.converges()


class WatchedTableWithLittleRoom(WatchedTable):
    """The same, where what nobody draws is folded soon."""

    def __init__(self) -> None:
        super().__init__()
        self._kept = module._KEPT
        module._KEPT = 3  # type: ignore[misc]

    def teardown(self) -> None:
        super().teardown()
        module._KEPT = self._kept  # type: ignore[misc]


TestWatchedTable = WatchedTable.TestCase
TestWatchedTableWithLittleRoom = WatchedTableWithLittleRoom.TestCase
_SETTINGS = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestWatchedTable.settings = TestWatchedTableWithLittleRoom.settings = _SETTINGS


@given(st.integers(1, 20))
def test_what_is_not_drawn_is_folded(extra: int) -> None:
    watching = WatchState("*")
    watching.snapshot(m.SnapshotPart(0, {}))
    for serial in range(1, module._KEPT + extra + 1):
        watching.event(m.Event(serial, "registered", f"n{serial}", serial))
    snapshot = watching.draw()
    assert isinstance(snapshot, Snapshot)
    assert snapshot.reason == "overflow"
    assert len(snapshot.entries) == module._KEPT
    while watching.draw() is not None:
        pass
    assert len(watching.held) == module._KEPT + extra


# Over real servers


@pytest.fixture
def pipe() -> Iterator[int]:
    ends = os.pipe()
    yield ends[0]
    for end in ends:
        os.close(end)


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


def test_a_watch_under_churn_misses_nothing(server: Any, client: Client, pipe: int) -> None:
    follower = Follower()
    with fdshare.connect(server.address) as other:
        thread = threading.Thread(target=churn, args=(other, pipe, 1, 600))
        with client.watch(timeout=30) as watch:
            thread.start()
            while not follower.follow(next(watch)):
                assert watch.held == follower.table
            assert watch.held == follower.table
        thread.join()
    assert sorted(follower.table) == client.names()


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_many_watches_under_churn_miss_nothing(server: Any, pipe: int, backend: str) -> None:
    """A hundred watches of one client, each from a moment of its own."""

    async def one(client: Any, followers: list[Follower]) -> None:
        follower = Follower()
        async with client.watch(timeout=30) as watch:
            while not follower.follow(await anext(watch)):
                pass
            assert watch.held == follower.table
        followers.append(follower)

    async def main() -> None:
        followers: list[Follower] = []
        with fdshare.connect(server.address) as other:
            async with fdshare.aio.connect(server.address) as client:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(anyio.to_thread.run_sync, churn, other, pipe, 2, 200)
                    for _ in range(100):
                        tasks.start_soon(one, client, followers)
                        await anyio.lowlevel.checkpoint()
                assert len(followers) == 100
                names = await client.names()
                assert all(sorted(f.table) == names for f in followers)

    anyio.run(main, backend=backend)


def test_a_slow_watcher_is_told_and_converges(server: Any, client: Client, pipe: int) -> None:
    with client.watch(timeout=30) as watch:
        assert next(watch).event == "snapshot"
        # More than the socket, and what the server keeps for it, can hold.
        for i in range(6000):
            client.register(f"{i % 50:03}".ljust(255, "-"), pipe, replace=True)
        client.register("end", pipe)
        reasons = []
        while "end" not in watch.held:
            change = next(watch)
            if change.event == "snapshot":
                reasons.append(change.reason)
        assert reasons
        assert set(reasons) == {"overflow"}
        assert sorted(watch.held) == client.names()
        client.unregister("end")
        while "end" in watch.held:
            assert next(watch).event == "unregistered"


def test_many_watches_of_a_slow_watcher_converge(server: Any, client: Client, pipe: int) -> None:
    """Their snapshots together are more than a server keeps for a connection."""

    def change() -> None:
        for i in range(4000):
            client.register(f"{i % 1600:04}".ljust(255, "-"), pipe, replace=True)
        client.register("end", pipe)

    async def main() -> None:
        async with fdshare.aio.connect(server.address) as slow:
            watches = [slow.watch(timeout=30) for _ in range(10)]
            for watch in watches:
                await anext(watch)
            accepted = client.stats().counters["accepted"]
            change()  # without an await: nobody reads
            for watch in watches:
                while "end" not in watch.held:
                    await anext(watch)
                assert len(watch.held) == 1601
            client.unregister("end")
            for watch in watches:
                while "end" in watch.held:
                    await anext(watch)
                await watch.close()
            assert client.stats().counters["accepted"] == accepted  # it was never cut off

    anyio.run(main)


def test_a_thousand_watchers_of_one_event(server: Any, client: Client, pipe: int) -> None:
    """A hundred connections with ten watches each: the event goes out once a connection."""

    async def main() -> None:
        from contextlib import AsyncExitStack

        async with AsyncExitStack() as stack:
            watches = []
            for i in range(100):
                one = await stack.enter_async_context(fdshare.aio.connect(server.address))
                patterns = ("*", "x*", "x", "?", "[x]", f"{i}", "x?", "*", "x", f"x{i}")
                watches += [one.watch(pattern, timeout=30) for pattern in patterns]
            for watch in watches:
                await stack.enter_async_context(watch)
                await anext(watch)
            for name in ("x", "x7"):
                client.register(name, pipe)
            for watch in watches:
                matches = matcher(watch.pattern)
                expected = [name for name in ("x", "x7") if matches(name)]
                assert [(await anext(watch)).name for _ in expected] == expected

    anyio.run(main)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_client_that_is_not_drawn_from_is_no_slow_reader(
    server: Any, client: Client, pipe: int, backend: str
) -> None:
    """The connection is read all the same: the requests of other tasks go on."""

    async def main() -> None:
        async with fdshare.aio.connect(server.address) as watcher, watcher.watch() as watch:
            await anext(watch)
            await anyio.to_thread.run_sync(change)
            assert await watcher.names() == client.names()
            snapshot = await anext(watch)
            assert snapshot.reason == "overflow"
            while "end" not in watch.held:
                await anext(watch)
            assert sorted(watch.held) == client.names()

    def change() -> None:
        for i in range(module._KEPT + 10):
            client.register(f"n{i % 20}", pipe, replace=True)
        client.register("end", pipe)

    anyio.run(main, backend=backend)


# Servers that die


@pytest.mark.parametrize("backend", ["blocking", "asyncio", "trio"])
def test_the_state_converges_while_the_server_is_killed(backend: str, pipe: int) -> None:
    """Its keeper makes another one each time; nothing that is held is lost."""

    def kill_and_change(address: str) -> None:
        with fdshare.connect(address) as client:
            for i in range(4):  # with the fifth its keeper would take it for a crash loop
                client.register(f"n{i % 3}", pipe, replace=True)
                os.kill(client.stats().server_pid, signal.SIGKILL)
                client.register(f"m{i}", pipe)
                if i % 2:
                    client.unregister(f"n{i % 3}")
            client.register("end", pipe)

    def blocking(manager: Manager) -> None:
        thread = threading.Thread(target=kill_and_change, args=(manager.address,))
        with manager.watch(timeout=30) as watch:
            next(watch)
            thread.start()
            while "end" not in watch.held:
                next(watch)
            assert watch.held == {e.name: e.generation for e in manager.infos()}
        thread.join()

    async def waiting(manager: Manager) -> None:
        async with (
            fdshare.aio.connect(manager.address) as client,
            client.watch(timeout=30) as watch,
        ):
            await anext(watch)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(anyio.to_thread.run_sync, kill_and_change, manager.address)
                while "end" not in watch.held:
                    await anext(watch)
            assert watch.held == {e.name: e.generation for e in await client.infos()}

    with Manager() as manager:
        if backend == "blocking":
            blocking(manager)
        else:
            anyio.run(waiting, manager, backend=backend)


def test_the_state_of_another_server_is_the_new_one(folder: Path, pipe: int) -> None:
    """Serials of the new server may be below those of the old."""
    with Manager(folder / "s", keeper=False) as first:
        watch = first.watch(timeout=30)
        next(watch)
        for i in range(10):
            first.register(f"old{i}", pipe)
        while len(watch.held) < 10:
            next(watch)
    with pytest.raises(ClosedDescriptor):  # the manager that it belongs to is closed
        next(watch)
    watch.close()
    with fdshare.Client(folder / "s") as client:
        watch = client.watch(timeout=30)
        with Manager(folder / "s", keeper=False) as second:
            second.register("one", pipe)
            next(watch)
        with Manager(folder / "s", keeper=False) as third:
            third.register("new", pipe)
            assert next(watch).reason == "reconnect"
            assert watch.held.keys() == {"new"}
            third.unregister("new")
            assert next(watch).event == "unregistered"
        watch.close()


def test_a_forked_child_does_not_read_its_parents_watch(server: Any, client: Client) -> None:
    with socket.socket() as sock, client.watch(timeout=30) as watch:
        next(watch)
        pid = os.fork()
        if not pid:
            try:
                change = next(watch)  # on a connection of its own
                os._exit(0 if change.event == "snapshot" else 1)
            finally:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        client.register("x", sock)
        assert next(watch).name == "x"
