"""watch: many watches of one asynchronous client."""

from __future__ import annotations

import gc
from typing import Any

import anyio
import pytest
from nursery import Manager

import fdshare
from client.churn import Follower, churn, kill_and_change
from fdshare.client import watch_state as module
from fdshare.client.blocking.client import Client
from fdshare.errors import InvalidArgument
from fdshare.protocol.names import matcher


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


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_the_state_converges_while_the_server_is_killed(backend: str, pipe: int) -> None:
    """Its keeper makes another one each time; nothing that is held is lost."""

    async def main(address: str) -> None:
        async with fdshare.aio.connect(address) as client, client.watch(timeout=30) as watch:
            await anext(watch)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(anyio.to_thread.run_sync, kill_and_change, address, pipe)
                while "end" not in watch.held:
                    await anext(watch)
            assert watch.held == {e.name: e.generation for e in await client.infos()}

    with Manager() as manager:
        anyio.run(main, manager.address, backend=backend)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_watch_that_was_refused_is_dropped_in_silence(server: Any, backend: str) -> None:
    async def main() -> None:
        async with fdshare.aio.connect(server.address) as mine:
            with pytest.raises(InvalidArgument):
                mine.watch("a" * 2000)
            gc.collect()

    anyio.run(main, backend=backend)
