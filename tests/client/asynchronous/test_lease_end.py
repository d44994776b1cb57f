"""lease_end: a take that is done is returned, and a Task.cancel() in that moment is not lost."""

from __future__ import annotations

import asyncio
import errno
import types
from collections.abc import AsyncIterator, Callable, Coroutine, Generator
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

import anyio
import pytest

import fdshare
from fdshare.client.blocking.client import Client

OnWait: TypeAlias = Callable[[Any], object]


@types.coroutine
def watched(coroutine: Coroutine[Any, Any, Any], on_wait: OnWait) -> Generator[Any, Any, Any]:
    """Runs *coroutine*; *on_wait* is called with each future that it waits for, before."""
    value: Any = None
    failure: BaseException | None = None
    while True:
        try:
            waits_for = coroutine.send(value) if failure is None else coroutine.throw(failure)
        except StopIteration as stop:
            return stop.value
        if waits_for is not None:
            on_wait(waits_for)
        value = failure = None
        try:
            value = yield waits_for
        except BaseException as error:
            failure = error


class Taker:
    """Takes, and does something when the take is done and waits for the end of its lease."""

    def __init__(self, mine: Any, confirmed: OnWait) -> None:
        self._mine = mine
        self._confirmed = confirmed
        self._waits = 0
        self.taken = 0

    async def take(self) -> None:
        self._waits = 0
        (await watched(self._mine.take("held", timeout=None), self._on_wait)).close()
        self.taken += 1

    def _on_wait(self, future: Any) -> None:
        self._waits += 1
        if self._waits == 2:  # the first is for the answer
            self._confirmed(future)


@asynccontextmanager
async def connected(server: Any, client: Client, pipe: int) -> AsyncIterator[Any]:
    client.register("held", pipe)
    async with fdshare.aio.connect(server.address) as mine, asyncio.timeout(20):
        yield mine
        assert await mine.names() == []


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_a_worker_that_is_cancelled_ends(
    server: Any, client: Client, pipe: int, late: bool
) -> None:
    """It took for ever, and who waited for its end waited for ever, too."""

    async def main() -> None:
        async def work() -> None:
            while True:
                await taker.take()

        def cancel(future: Any) -> None:
            if late:  # when the lease has ended, and before the task goes on
                future.add_done_callback(lambda _: worker.cancel("why"))
            else:
                worker.cancel("why")

        async with connected(server, client, pipe) as mine:
            taker = Taker(mine, cancel)
            worker = asyncio.create_task(work())
            with pytest.raises(asyncio.CancelledError, match="why"):
                await worker
            assert taker.taken == 1
            assert worker.cancelling() == 1

    asyncio.run(main())


def test_a_group_whose_other_task_fails_ends(server: Any, client: Client, pipe: int) -> None:
    async def main() -> None:
        async def work() -> None:
            while True:
                await taker.take()

        async def fail() -> None:
            await confirmed.wait()
            raise ZeroDivisionError

        async with connected(server, client, pipe) as mine:
            confirmed = asyncio.Event()
            taker = Taker(mine, lambda _: confirmed.set())
            with pytest.raises(ExceptionGroup) as caught:
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(work())
                    tasks.create_task(fail())
            assert [type(error) for error in caught.value.exceptions] == [ZeroDivisionError]
            assert taker.taken == 1

    asyncio.run(main())


@pytest.mark.parametrize("also", [False, True], ids=["alone", "and a cancel"])
def test_a_timeout_that_was_too_late_ends_nothing_else(
    server: Any, client: Client, pipe: int, also: bool
) -> None:
    """But who cancels the task in the same moment ends it."""

    async def main() -> None:
        reached: list[str] = []

        async def work() -> None:
            async with asyncio.timeout(None) as limit:

                def end(future: Any) -> None:
                    limit.reschedule(0)
                    if also:
                        asyncio.get_running_loop().call_soon(worker.cancel)

                await Taker(mine, end).take()
            reached.append("the end of the timeout")
            await asyncio.sleep(0)
            await mine.ping()
            reached.append("the next wait")

        async with connected(server, client, pipe) as mine:
            worker = asyncio.create_task(work())
            await asyncio.wait([worker])
            assert worker.cancelled() is also
            assert reached == ["the end of the timeout", "the next wait"][: 1 if also else 2]

    asyncio.run(main())


def test_a_timeout_around_more_than_the_take(server: Any, client: Client, pipe: int) -> None:
    async def main() -> None:
        async with connected(server, client, pipe) as mine:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(None) as limit:
                    await Taker(mine, lambda _: limit.reschedule(0)).take()
                    await mine.wait("never")
            await mine.ping()

    asyncio.run(main())


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "max_user_watches"), RuntimeError("can't start new thread")],
    ids=["os", "thread"],
)
def test_what_was_taken_is_returned_where_the_end_cannot_be_waited_for(
    server: Any,
    client: Client,
    pipe: int,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    backend: str,
) -> None:
    """It was lost: the entry was gone, and the call raised what epoll_ctl(2) did."""
    client.register("held", pipe)

    async def main() -> None:
        async with fdshare.aio.connect(server.address) as mine:
            connection = mine._pipeline._transport.sock

            async def wait_readable(sock: Any) -> None:
                if sock is not connection:
                    raise error
                await watch(sock)

            watch = anyio.wait_readable
            monkeypatch.setattr(anyio, "wait_readable", wait_readable)
            (await mine.take("held")).close()
            assert await mine.names() == []

    anyio.run(main, backend=backend)
