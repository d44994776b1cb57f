"""FollowState: answers in, the object out; and servers that lie about it."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from typing import Any

import pytest

from fdshare import aio, ref
from fdshare.client.blocking.client import Client
from fdshare.client.conversation import WholeAnswer
from fdshare.client.follow_state import FollowState
from fdshare.client.mapped_page import MappedPage
from fdshare.errors import (
    AccessDenied,
    FetchTimeout,
    InvalidArgument,
    NameNotFound,
    NoServer,
    ProtocolError,
    QuotaExceeded,
    ServerGone,
    ServerTimeout,
)
from fdshare.kernel.descriptor import Descriptor
from fdshare.protocol import messages as m
from fdshare.server.core.slots import FIRST
from fdshare.server.loop.page import MemoryPage, new_page

SERVER = m.Welcome(m.MAGIC, m.VERSION, 1, "epoch", 0, 0, 0)
DESCRIPTOR = m.Kind("descriptor", m.encode(None))


@pytest.fixture
def page() -> Iterator[MemoryPage]:
    memfd = new_page()
    assert memfd is not None
    page = MemoryPage(memfd)
    yield page
    memfd.close()
    os.close(page.handle.fd)


@pytest.fixture
def state() -> Iterator[FollowState]:
    mapped = MappedPage()
    state = FollowState("x", 0, mapped)
    yield state
    state.seen = None
    mapped.close()


async def _awaits(_: Any) -> None: ...


@pytest.mark.parametrize(
    ("argument", "wrong"),
    [
        *[("timeout", seconds) for seconds in (-1, "5", True, float("nan"))],
        *[("on_change", call) for call in (5, "x", _awaits)],
    ],
    ids=lambda value: getattr(value, "__name__", repr(value)),
)
def test_what_cannot_be_used_is_refused_at_once(client: Client, argument: str, wrong: Any) -> None:
    """And not when the name is missing, or changes."""
    with open(os.devnull) as file:
        client.register("log", file)
    with pytest.raises(InvalidArgument, match=f"^{argument}: "):
        client.follow("log", **{argument: wrong})
    with pytest.raises(InvalidArgument, match=f"^{argument}: "):
        ref("log", client.address).follow(**{argument: wrong})
    with pytest.raises(InvalidArgument, match=f"^{argument}: "):
        aio.connect(client.address).follow("log", **{argument: wrong})


def null() -> Descriptor:
    return Descriptor(os.open(os.devnull, os.O_RDONLY))


def followed(generation: int, **fields: Any) -> m.Followed:
    return m.Followed(generation, **fields)


def answer(
    state: FollowState,
    reply: m.Reply,
    descriptors: list[Descriptor] | None = None,
    server: m.Welcome = SERVER,
) -> bool:
    _, known = state.question()
    return state.answered(WholeAnswer([reply], descriptors or []), server, known)


def first(state: FollowState, page: MemoryPage) -> None:
    """Has the page mapped, and generation 1 in the first slot with stamp 5."""
    page.write(FIRST, 5)
    given = followed(1, kind=DESCRIPTOR, slot=FIRST, stamp=5, page=page.id, mapped=True)
    assert not answer(state, given, [null(), Descriptor.dup_of(page.handle.fd)])


def test_it_is_current_until_the_stamp_is_another(state: FollowState, page: MemoryPage) -> None:
    assert state.question()[0].request == m.Follow("x")
    first(state, page)
    assert state.seen is not None
    assert state.seen.is_current()
    assert state.question()[0].request == m.Follow("x", 0, 1, "epoch", page.id)
    page.write(FIRST, 6)
    assert not state.seen.is_current()
    before = state.seen.obj
    assert not answer(state, followed(1, slot=FIRST, stamp=6, page=page.id))
    assert state.seen.is_current()
    assert state.seen.obj is before
    page.write(FIRST, 7)
    there = followed(2, kind=DESCRIPTOR, slot=FIRST, stamp=7, page=page.id)
    assert answer(state, there, [null()])
    assert state.seen.obj is not before
    assert before.closed


def test_without_a_slot_it_is_never_current(state: FollowState) -> None:
    assert not answer(state, followed(1, kind=DESCRIPTOR), [null()])
    assert state.seen is not None
    assert not state.seen.is_current()


def test_a_version_is_closed_with_its_last_user(state: FollowState, page: MemoryPage) -> None:
    first(state, page)
    leased = state.seen
    assert leased is not None
    answer(state, followed(2, kind=DESCRIPTOR), [null()])
    obj = leased.obj
    assert not obj.closed
    del leased
    gc.collect(0)
    assert obj.closed


@pytest.mark.parametrize("error", [NoServer("/a", "none"), ServerGone("/a", "it ended")])
def test_without_a_server_the_last_object_stays(
    state: FollowState, page: MemoryPage, error: Any
) -> None:
    with pytest.raises(type(error)):
        state.refused(error)
    first(state, page)
    state.refused(error)
    assert state.stale
    assert state.seen is not None
    answer(state, followed(1))
    assert not state.stale


@pytest.mark.parametrize("error", [ServerTimeout("/a", 1.0), QuotaExceeded("max_waiting", 1, 1)])
def test_an_error_is_no_reason_to_believe_the_last_object(
    state: FollowState, page: MemoryPage, error: Any
) -> None:
    first(state, page)
    with pytest.raises(type(error)):
        state.refused(error)
    assert not state.stale
    assert state.seen is not None


@pytest.mark.parametrize(
    "error", [NameNotFound("x"), FetchTimeout("x", 1.0), AccessDenied("fetch", "x", 1, "rule")]
)
def test_after_a_refusal_there_is_no_object(
    state: FollowState, page: MemoryPage, error: Any
) -> None:
    first(state, page)
    assert state.seen is not None
    obj = state.seen.obj
    with pytest.raises(type(error)):
        state.refused(error)
    assert state.seen is None
    assert obj.closed
    assert state.question()[1] == 0


def test_a_later_answer_that_came_in_between_stays(state: FollowState, page: MemoryPage) -> None:
    first(state, page)
    _, known = state.question()
    answer(state, followed(2, kind=DESCRIPTOR), [null()])  # in a signal's handler
    later = state.seen
    assert not state.answered(WholeAnswer([followed(1)], []), SERVER, known)
    assert state.seen is later


LIES = {
    "another answer": lambda page: (m.Done(), []),
    "no page": lambda page: (followed(1, mapped=True), []),
    "a page that is none": lambda page: (
        followed(1, kind=DESCRIPTOR, slot=1, mapped=True),
        [null(), null()],
    ),
    "a page that was never sent": lambda page: (
        followed(1, kind=DESCRIPTOR, slot=FIRST, page=5),
        [null()],
    ),
    "a slot beyond the page": lambda page: (
        followed(1, kind=DESCRIPTOR, slot=page.size, page=page.id, mapped=True),
        [null(), Descriptor.dup_of(page.handle.fd)],
    ),
    "a slot before the page": lambda page: (
        followed(1, kind=DESCRIPTOR, slot=-1, page=page.id, mapped=True),
        [null(), Descriptor.dup_of(page.handle.fd)],
    ),
    "descriptors without a kind": lambda page: (followed(1), [null()]),
    "another generation without a kind": lambda page: (followed(9), []),
}


@pytest.mark.parametrize("lie", LIES)
def test_what_a_server_says_is_checked(state: FollowState, page: MemoryPage, lie: str) -> None:
    reply, descriptors = LIES[lie](page)
    with pytest.raises(ProtocolError):
        answer(state, reply, list(descriptors))
    assert state.seen is None
    assert all(descriptor.closed for descriptor in descriptors)


def test_memory_that_could_shrink_is_no_page(state: FollowState) -> None:
    with Descriptor(os.memfd_create("page", os.MFD_ALLOW_SEALING)) as memfd:
        os.ftruncate(memfd.fileno(), 1 << 16)
        reply = followed(1, kind=DESCRIPTOR, slot=3, page=1, mapped=True)
        with pytest.raises(ProtocolError, match="could shrink"):
            answer(state, reply, [null(), memfd.dup()])
