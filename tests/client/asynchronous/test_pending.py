"""pending: what a call and a watch make of answers, of the end of the connection, of cancelling."""

from __future__ import annotations

import os

import anyio
import anyio.lowlevel
import pytest

from fdshare.client.asynchronous.pending import PendingRequest, Subscription
from fdshare.client.conversation import Answer, Exchange
from fdshare.client.settings import Search
from fdshare.client.watch_state import Snapshot, WatchState
from fdshare.errors import AccessDenied, NoServer
from fdshare.kernel.descriptor import Descriptor
from fdshare.protocol import messages as m


def null() -> Descriptor:
    return Descriptor(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))


def call(exchange: Exchange | None = None) -> PendingRequest:
    return PendingRequest(1, exchange or Exchange(m.Ping()), Search(1.0))


def part(names: list[str], more: bool, *descriptors: Descriptor) -> Answer:
    return Answer(1, m.NameList(names, more), list(descriptors), None)


def test_a_call_is_done_with_its_last_part() -> None:
    waits = call()
    assert not waits.answer(part(["a"], True))
    assert not waits.done.is_set()
    assert waits.answer(part(["b"], False))
    assert waits.done.is_set()
    assert len(waits.parts.replies) == 2


def test_an_abandoned_call_closes_what_comes_until_the_last_part() -> None:
    waits = call()
    waits.abandoned = True
    first, last = null(), null()
    assert not waits.answer(part(["a"], True, first))
    assert waits.answer(part(["b"], False, last))
    assert first.closed
    assert last.closed
    assert not waits.done.is_set()


def test_half_an_answer_counts_no_more_when_the_connection_is_gone() -> None:
    waits = call(Exchange(m.Fetch("a", 500.0), wait=500.0))
    came = null()
    waits.answer(part(["a"], True, came))
    waits.lost()
    assert came.closed
    assert waits.parts.replies == []
    request = waits.exchange.request
    assert isinstance(request, m.Fetch)
    assert request.wait is not None
    assert request.wait <= 500.0


def test_a_call_that_fails_is_done_and_closes_what_came() -> None:
    waits, came = call(), null()
    waits.answer(part(["a"], True, came))
    waits.fail(NoServer("/path", "gone"))
    assert waits.done.is_set()
    assert isinstance(waits.error, NoServer)
    assert came.closed


# Watches.


def subscription() -> Subscription:
    return Subscription(2, WatchState("*"), Search(1.0))


def answer(reply: m.Reply) -> Answer:
    return Answer(2, reply, [], None)


def test_a_watch_is_ready_with_the_whole_snapshot() -> None:
    async def main() -> None:
        watch = subscription()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watch.ready)
            await anyio.lowlevel.checkpoint()
            assert not watch.answer(answer(m.SnapshotPart(1, {"a": 1}, more=True)))
            assert watch._ready is not None
            assert not watch._ready.is_set()
            assert not watch.answer(answer(m.SnapshotPart(1, {"b": 2})))
        snapshot = watch.state.draw()
        assert isinstance(snapshot, Snapshot)
        assert snapshot.entries == {"a": 1, "b": 2}

    anyio.run(main)


@pytest.mark.parametrize("how", ["refused", "failed"])
def test_whoever_waits_for_a_watch_hears_that_it_failed(how: str) -> None:
    async def main() -> None:
        watch = subscription()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watch.ready)
            await anyio.lowlevel.checkpoint()
            error = AccessDenied("watch", "*", 1, "no rule")
            if how == "refused":
                assert watch.answer(answer(m.refusal(error)))
            else:
                watch.fail(error)
        await watch.ready()  # and never waits again
        assert isinstance(watch.error, AccessDenied)

    anyio.run(main)
