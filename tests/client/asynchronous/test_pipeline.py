"""pipeline: many tasks on one connection, cancelled at any await, over the death of a server."""

from __future__ import annotations

import asyncio
import os
import random
import select
import types
from collections.abc import Callable, Coroutine, Generator
from pathlib import Path
from typing import Any, TypeAlias

import anyio
import anyio.lowlevel
import pytest
from conftest import census
from nursery import Manager

import fdshare
from fdshare.client.asynchronous.pipeline import _MOST_CHANGES
from fdshare.client.blocking.client import Client
from fdshare.errors import (
    ClosedDescriptor,
    FetchTimeout,
    InvalidName,
    KindMismatch,
    NameNotFound,
    NameTaken,
)
from fdshare.server.core.table import ANSWERS_KEPT

BACKENDS = pytest.mark.parametrize("backend", ["asyncio", "trio"])


Step: TypeAlias = Callable[[Any, int], Coroutine[Any, Any, Any]]


async def leases_end(client: Any) -> None:
    """Returns when nothing is leased: the server closes its copy of a lease in a thread."""
    with anyio.fail_after(20):
        while (await client.stats()).leases:
            await anyio.lowlevel.checkpoint()


@types.coroutine
def interrupted(
    coroutine: Coroutine[Any, Any, Any], at: int, cancel: Callable[[], None], late: bool
) -> Generator[Any, Any, Any]:
    """Runs *coroutine* and cancels at its *at*-th suspension: before it waits, or (*late*) when it
    goes on. Returns (its result, whether it got that far)."""
    count = 0
    value: Any = None
    failure: BaseException | None = None
    while True:
        try:
            waits_for = coroutine.send(value) if failure is None else coroutine.throw(failure)
        except StopIteration as stop:
            return stop.value, count > at
        count += 1
        if count - 1 == at and not late:
            cancel()
        value = failure = None
        try:
            value = yield waits_for
        except BaseException as error:
            failure = error
        if count - 1 == at and late:
            cancel()


async def fetch(client: Any, fd: int) -> None:
    (await client.fetch("held")).close()


async def fetch_late(client: Any, fd: int) -> None:
    (await client.fetch("late", timeout=30)).close()


async def fetch_many(client: Any, fd: int) -> None:
    for found in (await client.fetch_many([f"many{i}" for i in range(3)])).values():
        found.close()


async def take(client: Any, fd: int) -> None:
    (await client.take("held")).close()


async def take_late(client: Any, fd: int) -> None:
    (await client.take("late", timeout=30)).close()


async def register(client: Any, fd: int) -> None:
    await client.register("new", fd)


async def register_for_life(client: Any, fd: int) -> None:
    await client.register("new", fd, lifetime="connection")


async def unregister(client: Any, fd: int) -> None:
    await client.unregister("held")


async def rename(client: Any, fd: int) -> None:
    await client.rename("held", "new")


async def bind(client: Any, fd: int) -> None:
    (await client.bind("new", "tcp://127.0.0.1:0")).close()


async def wait_late(client: Any, fd: int) -> None:
    await client.wait("late")


async def ask(client: Any, fd: int) -> None:
    await client.names()
    await client.info("many1")
    await client.stats()


async def watch(client: Any, fd: int) -> None:
    async with client.watch("l*") as watch:
        await anext(watch)
        while "late" not in watch.held:
            await anext(watch)


STEPS = [
    fetch,
    fetch_late,
    fetch_many,
    take,
    take_late,
    register,
    register_for_life,
    unregister,
    rename,
    bind,
    wait_late,
    ask,
    watch,
]


@BACKENDS
@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("step", STEPS)
def test_cancelled_at_every_await(
    server: Any, client: Client, pipe: int, backend: str, step: Step, late: bool
) -> None:
    """Nothing leaks here, the server holds what its registry says, the connection goes on."""

    async def main() -> None:
        async with fdshare.aio.connect(server.address) as mine:
            for at in range(100):
                for name in ("held", "many0", "many1", "many2"):
                    client.register(name, pipe, replace=True)
                if await one(mine, at):
                    break
                for name in client.names():
                    client.unregister(name)
            else:
                pytest.fail("it suspends for ever")
        assert at

    async def one(mine: Any, at: int) -> bool:
        """True where it was done before it could be cancelled."""
        await mine.ping()
        (await mine.fetch("held")).close()
        lives = mine._lifeline._ends is not None
        before = census()
        finished = False
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(appear)
                _, interfered = await interrupted(step(mine, pipe), at, scope.cancel, late)
                finished = not interfered
        # What was cancelled is answered before this is.
        await mine.ping()
        lifeline = 2 * (not lives and mine._lifeline._ends is not None)
        after = census()
        assert before.items() <= after.items()
        assert len(after) == len(before) + lifeline
        if step in (take, take_late) and not finished:
            await taken_or_returned(mine, "held" if step is take else "late")
        return finished

    async def appear() -> None:
        await anyio.lowlevel.checkpoint()
        client.register("late", pipe, replace=True)

    async def taken_or_returned(mine: Any, name: str) -> None:
        """What is not there was taken; a lease is none of both."""
        await leases_end(mine)
        if name in await mine.names():
            (await mine.take(name)).close()

    anyio.run(main, backend=backend)


def test_native_cancellation_of_asyncio(server: Any, client: Client, pipe: int) -> None:
    """Task.cancel() at each turn of the loop, also when the answer is already there."""

    async def main() -> None:
        async with fdshare.aio.connect(server.address) as mine:
            client.ping()  # its connection is open from now on
            before = census()
            turns = taken = 0
            while taken < 5:
                client.register("held", pipe, replace=True)
                taken += await one(mine, turns)
                assert census() == before
                turns += 1
            assert turns > taken

    async def one(mine: Any, turns: int) -> bool:
        task = asyncio.create_task(mine.take("held"))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        try:
            taken = await task
        except asyncio.CancelledError:
            await mine.ping()
            await mine.wait("held", timeout=20)  # it is back
            return False
        taken.close()
        assert await mine.names() == []
        return True

    asyncio.run(main())


def test_cancelled_when_the_answer_is_there(server: Any, client: Client, pipe: int) -> None:
    """The canceller is woken by the same read that brought the descriptors, and runs first."""

    async def main() -> None:
        async with fdshare.aio.connect(server.address) as mine:
            for _ in range(50):
                client.register("held", pipe, replace=True)
                before = census()
                tasks: list[asyncio.Task[Any]] = []

                async def cancel(tasks: list[asyncio.Task[Any]] = tasks) -> None:
                    await mine.ping()
                    tasks[1].cancel()

                async def take() -> None:
                    (await mine.take("held")).close()

                tasks += [asyncio.create_task(cancel()), asyncio.create_task(take())]
                await asyncio.gather(*tasks, return_exceptions=True)
                await mine.ping()
                assert census() == before
                await leases_end(mine)
                assert await mine.names() == (["held"] if tasks[1].cancelled() else [])

    asyncio.run(main())


@BACKENDS
def test_cancelled_at_random_among_many(
    server: Any, client: Client, pipe: int, backend: str
) -> None:
    """Three hundred tasks, each cancelled at some await, on one connection."""
    choose = random.Random(8)

    async def one(mine: Any, step: Step, at: int, late: bool) -> None:
        with anyio.CancelScope() as scope:
            try:
                await interrupted(step(mine, pipe), at, scope.cancel, late)
            except (NameNotFound, NameTaken, KindMismatch):
                pass  # another task was faster

    async def main() -> None:
        async with fdshare.aio.connect(server.address) as mine:
            await register_for_life(mine, pipe)
            client.ping()  # its connection is open from now on
            before = census()
            for _ in range(3):
                for name in ("held", "many0", "many1", "many2"):
                    client.register(name, pipe, replace=True)
                async with anyio.create_task_group() as tasks:
                    for _ in range(100):
                        step = choose.choice(STEPS)
                        tasks.start_soon(
                            one, mine, step, choose.randrange(4), choose.random() < 0.5
                        )
                    await anyio.lowlevel.checkpoint()
                    client.register("late", pipe, replace=True)
                    with anyio.move_on_after(0.2):  # a take may have been faster than the others
                        await mine.wait("never")
                    tasks.cancel_scope.cancel()
                await mine.ping()
                assert census() == before
                await leases_end(mine)

    anyio.run(main, backend=backend)


@BACKENDS
def test_a_cancelled_registration_that_was_not_sent_sends_nothing(
    server: Any, pipe: int, backend: str
) -> None:
    """Its number may be another descriptor's by then."""

    async def main() -> None:
        async with fdshare.aio.connect(server.address) as mine:
            transport = mine._pipeline._transport
            # As much as the server lets pass while it does not read: nothing, for it is stopped.
            os.kill(server.pid, 19)
            try:
                with anyio.CancelScope() as scope:
                    async with anyio.create_task_group() as tasks:
                        sent = 0
                        while not transport._output:  # until the socket is full
                            tasks.start_soon(mine.explain, "bind", "x" * 60000, 0, 0)
                            await anyio.lowlevel.checkpoint()
                            sent += 1
                        tasks.start_soon(mine.register, "wrong", pipe)
                        while len(transport._output) < 2:
                            await anyio.lowlevel.checkpoint()
                        scope.cancel()
                assert sent > 1
            finally:
                os.kill(server.pid, 18)
            await mine.ping()
            assert await mine.names() == []

    anyio.run(main, backend=backend)


@BACKENDS
def test_a_thousand_waits_on_one_client(
    server: Any, client: Client, pipe: int, backend: str
) -> None:
    arrived: list[str] = []

    async def wait(mine: Any, name: str) -> None:
        await mine.wait(name, timeout=60)
        arrived.append(name)

    async def fetch(mine: Any, name: str) -> None:
        (await mine.fetch(name, timeout=60)).close()
        arrived.append(name)

    async def main() -> None:
        async with fdshare.aio.connect(server.address) as mine:
            connections = client.stats().connections
            async with anyio.create_task_group() as tasks:
                for i in range(1000):
                    tasks.start_soon(wait if i % 2 else fetch, mine, f"n{i // 4}")
                await mine.ping()
                assert client.stats().connections == connections
                for i in range(250):
                    client.register(f"n{i}", pipe)
        assert sorted(arrived) == sorted(f"n{i // 4}" for i in range(1000))

    anyio.run(main, backend=backend)


@BACKENDS
def test_more_descriptors_than_may_be_in_flight(
    server: Any, client: Client, pipe: int, backend: str
) -> None:
    """The server stops serving a connection that does not read; this one always does."""

    async def fetch(mine: Any) -> None:
        (await mine.fetch("x")).close()

    async def main() -> None:
        client.register("x", pipe)
        async with fdshare.aio.connect(server.address) as mine:
            async with anyio.create_task_group() as tasks:
                for _ in range(3000):
                    tasks.start_soon(fetch, mine)
            assert (await mine.info("x")).fetches == 3000

    anyio.run(main, backend=backend)


@BACKENDS
def test_only_one_of_many_takers_gets_it(
    server: Any, client: Client, pipe: int, backend: str
) -> None:
    taken: list[int] = []

    async def take(mine: Any) -> None:
        try:
            (await mine.take("x", timeout=0.2)).close()
        except FetchTimeout:
            return
        taken.append(1)

    async def main() -> None:
        client.register("x", pipe)
        one = fdshare.aio.connect(server.address)
        async with one as mine, anyio.create_task_group() as tasks:
            for _ in range(20):
                tasks.start_soon(take, mine)

    anyio.run(main, backend=backend)
    assert taken == [1]


@BACKENDS
def test_changes_go_on_over_the_death_of_a_server(pipe: int, backend: str) -> None:
    """Two hundred at once, each repeated under its id: it happens once."""

    async def main() -> None:
        async with fdshare.aio.connect(manager.address) as mine:
            for i in range(3):
                async with anyio.create_task_group() as tasks:
                    for j in range(200):
                        tasks.start_soon(mine.register, f"{i}/{j}", pipe)
                    await anyio.lowlevel.checkpoint()
                    os.kill((await mine.stats()).server_pid, 9)
                async with anyio.create_task_group() as tasks:
                    for j in range(100):
                        tasks.start_soon(mine.rename, f"{i}/{j}", f"new/{i}/{j}")
                        tasks.start_soon(mine.unregister, f"{i}/{j + 100}")
            assert len(await mine.names()) == 300
            infos = await mine.infos()
            assert len({info.generation for info in infos}) == 300
            # A change that was carried out twice would have taken two.
            assert (await mine.stats()).generation == 900

    with Manager() as manager:
        anyio.run(main, backend=backend)


@BACKENDS
def test_what_cannot_be_sent_concerns_nobody_else(folder: Path, null: int, backend: str) -> None:
    """Asked while there is no connection, it failed all that waited for the next one, or ended the
    client."""

    async def main() -> None:
        path = folder / "x.sock"
        first = await anyio.to_thread.run_sync(Manager(path, keeper=False).start)
        async with fdshare.aio.connect(path, reconnect=20) as mine:
            await mine.ping()
            await anyio.to_thread.run_sync(first.shutdown)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(mine.ping)
                await anyio.wait_all_tasks_blocked()
                with pytest.raises(InvalidName):
                    await mine.fetch("\ud800")
                with pytest.raises(InvalidName):
                    async for _ in mine.watch("\ud800"):
                        pass
                with pytest.raises(ClosedDescriptor):
                    await mine.register("large", 2**31)
                with Manager(path, keeper=False):
                    await mine.ping()

    anyio.run(main, backend=backend)


@BACKENDS
@pytest.mark.parametrize("verb", ["names", "watch"])
def test_an_answer_that_came_while_the_event_loop_stood_still(
    server: Any, verb: str, backend: str
) -> None:
    """It stood still for longer than the server may take: the server did not."""

    async def main() -> None:
        async with fdshare.aio.connect(server.address) as mine:
            connection = mine._pipeline._transport.sock

            def stand_still() -> None:
                assert select.select([connection], [], [], 20)[0]  # the answer is there
                select.select([], [], [], 2 * timeout)

            timeout = mine.timeout = mine._pipeline._timeout = 0.05
            if verb == "names":
                assert await interrupted(mine.names(), 0, stand_still, False) == ([], True)
            else:
                first, _ = await interrupted(mine.watch().__anext__(), 1, stand_still, False)
                assert first.reason == "start"
            assert mine._pipeline._transport.sock is connection

    anyio.run(main, backend=backend)


@BACKENDS
def test_a_close_ends_all_changes_that_wait_for_their_turn(
    server: Any, pipe: int, backend: str
) -> None:
    """Those beyond twice _MOST_CHANGES waited for ever."""
    count = 3 * _MOST_CHANGES
    ended: list[int] = []

    async def register(mine: Any, i: int) -> None:
        with pytest.raises(ClosedDescriptor):
            await mine.register(f"n{i}", pipe)
        ended.append(i)

    async def main() -> None:
        async with fdshare.aio.connect(server.address, timeout=None) as mine:
            os.kill(server.pid, 19)
            try:
                with anyio.fail_after(20):
                    async with anyio.create_task_group() as tasks:
                        for i in range(count):
                            tasks.start_soon(register, mine, i)
                        await anyio.wait_all_tasks_blocked()
                        await mine.close()
            finally:
                os.kill(server.pid, 18)

    anyio.run(main, backend=backend)
    assert sorted(ended) == list(range(count))


def test_no_more_changes_are_under_way_than_a_server_remembers() -> None:
    """A repeat of one more could be carried out twice."""
    assert _MOST_CHANGES <= ANSWERS_KEPT
