"""follow: the object of now, for tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anyio
import pytest
from conftest import census
from nursery import Manager

import fdshare
from client.conftest import inode
from fdshare.client.asynchronous import follow as module
from fdshare.client.blocking.client import Client
from fdshare.errors import ClosedDescriptor, FetchTimeout, NameNotFound, NoServer

pytestmark = pytest.mark.parametrize("backend", ["asyncio", "trio"])


def run(address: str, backend: str, body: Callable[[Any], Any], **options: Any) -> None:
    """Runs *body* with an AsyncClient."""

    async def main() -> None:
        async with fdshare.aio.connect(address, **options) as client:
            await body(client)

    anyio.run(main, backend=backend)


def test_current_is_what_is_registered(
    server: Any, client: Client, files: list[Any], backend: str
) -> None:
    client.register("log", files[0])
    changes: list[Any] = []

    async def body(asynchronous: Any) -> None:
        async with asynchronous.follow("log", on_change=changes.append) as log:
            first = await log.current()
            assert inode(first) == inode(files[0])
            before = client.stats().counters["requests"]
            for _ in range(100):
                assert await log.current() is first
            assert client.stats().counters["requests"] == before + 1
            assert changes == []
            async with log.lease() as leased:
                registered = client.register("log", files[1], replace=True)
                second = await log.current()
                assert inode(second) == inode(files[1])
                assert log.generation == registered.generation
                assert changes == [second]
                assert leased is first
                assert not first.closed
            assert first.closed
            assert not log.stale
        assert second.closed
        with pytest.raises(ClosedDescriptor):
            await log.current()

    run(server.address, backend, body)


def test_many_tasks_ask_once(server: Any, client: Client, files: list[Any], backend: str) -> None:
    client.register("log", files[0])
    seen: list[Any] = []

    async def look(log: Any) -> None:
        seen.append(await log.current())

    async def body(asynchronous: Any) -> None:
        async with asynchronous.follow("log") as log:
            before = client.stats().counters["requests"]
            client.register("log", files[1], replace=True)
            async with anyio.create_task_group() as tasks:
                for _ in range(20):
                    tasks.start_soon(look, log)
            assert {inode(obj) for obj in seen} == {inode(files[1])}
            assert len(set(map(id, seen))) == 1
            assert client.stats().counters["requests"] == before + 3

    run(server.address, backend, body)


def test_a_name_that_is_missing(
    server: Any, client: Client, files: list[Any], backend: str
) -> None:
    async def body(asynchronous: Any) -> None:
        with pytest.raises(NameNotFound):
            await asynchronous.follow("log").current()
        with pytest.raises(FetchTimeout):
            async with asynchronous.follow("log", timeout=0.01):
                pass
        client.register("log", files[0])
        async with asynchronous.follow("log") as log, asynchronous.follow("log") as patient:
            patient._state.timeout = 20
            client.unregister("log")
            for _ in range(2):
                with pytest.raises(NameNotFound):
                    await log.current()

            async def wait() -> None:
                assert inode(await patient.current()) == inode(files[1])

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(wait)
                await anyio.wait_all_tasks_blocked()
                client.register("log", files[1])

    run(server.address, backend, body)


def test_a_cancelled_wait_leaves_nothing(
    server: Any, client: Client, files: list[Any], backend: str
) -> None:
    async def body(asynchronous: Any) -> None:
        log = asynchronous.follow("log", timeout=None)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(log.current)
            await anyio.wait_all_tasks_blocked()
            tasks.cancel_scope.cancel()
        client.ping()  # which has a connection from now on
        before = census()
        client.register("log", files[0])
        await asynchronous.ping()
        assert census() == before
        async with log:
            assert inode(await log.current()) == inode(files[0])

    run(server.address, backend, body)


def test_it_ends_with_its_client(
    server: Any, client: Client, files: list[Any], backend: str
) -> None:
    client.register("log", files[0])
    kept: list[Any] = []

    async def body(asynchronous: Any) -> None:
        log = asynchronous.follow("log")
        kept.extend((log, await log.current()))
        assert "closed" not in repr(log)

    run(server.address, backend, body)
    log, file = kept
    assert file.closed
    assert "closed" in repr(log)


def test_a_server_that_is_gone_and_comes_back(
    serve: Callable[..., Manager],
    files: list[Any],
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_AGAIN", 0.05)  # or the test would last a second
    manager = serve()
    manager.register("log", files[0])

    async def body(asynchronous: Any) -> None:
        async with asynchronous.follow("log") as log:
            file = await log.current()
            manager.shutdown()
            with pytest.raises(NoServer):
                fdshare.connect(manager.address)
            assert await log.current() is file
            assert log.stale
            assert await log.current() is file
            again = serve(manager.address)
            again.register("log", files[1])
            with anyio.fail_after(20):
                while inode(await log.current()) != inode(files[1]):
                    await anyio.lowlevel.checkpoint()
            assert not log.stale
            assert file.closed

    run(manager.address, backend, body, reconnect=0.1)
