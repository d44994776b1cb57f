"""Tasks and outcomes: opened by their own job, whatever it costs."""

from __future__ import annotations

import os
import socket
from typing import Any

import pytest

from fdshare import get_context
from fdshare.errors import DescriptorLimit
from fdshare.mp.backends import backend_of
from fdshare.mp.family import Family
from fdshare.mp.pickling.bundle import Bundle
from fdshare.mp.workers.tasks import (
    CALL,
    RAISED,
    RETURNED,
    Pickled,
    Task,
    beheaded,
    has_head,
    headed,
    hold_initializer,
    outcome,
    pickled,
)
from mp import children
from mp.common import PACKAGES, descriptor_limit_reached, identity, open_now, trackers  # noqa: F401


@pytest.fixture(params=PACKAGES)
def family(request: pytest.FixtureRequest) -> Family:
    return backend_of(request.param).FAMILY


def sent(form: int, content: Pickled) -> tuple[int, int, int, Pickled]:
    """What arrives of it."""
    message = headed(form, -1, 2**40, content)
    arrived = message.own() if isinstance(message, Bundle) else message
    assert has_head(arrived)
    return beheaded(arrived)


def test_a_task_is_its_call(family: Family) -> None:
    with socket.socket() as sock:
        task = Task.of(family, (children.identity, (sock,), {}))
        expected = identity(sock)
    *head, content = sent(CALL, task.content)
    assert head == [CALL, -1, 2**40]
    assert Task(family, content)() == expected


def test_a_task_that_nobody_runs_closes(family: Family) -> None:
    with socket.socket() as sock:
        before = open_now()
        Task.of(family, (children.identity, (sock,), {}))
        assert open_now() == before


@pytest.mark.parametrize("value", [5, [], ["a" * 1_000_000], {"a": (1.5, None)}])
def test_what_has_no_descriptors_is_a_pickle(family: Family, value: Any) -> None:
    content = pickled(family, value)
    assert type(content) is bytes
    assert not has_head(content)
    assert outcome(family, RETURNED, sent(RETURNED, content)[3]) == (True, value)


def test_an_outcome(family: Family) -> None:
    with socket.socket() as sock:
        form, *_, content = sent(RETURNED, pickled(family, sock))
        ok, arrived = outcome(family, form, content)
        with arrived:
            assert ok
            assert identity(arrived) == identity(sock)
    for form, value in (RETURNED, children.Bomb()), (RAISED, RuntimeError("no")):
        ok, error = outcome(family, form, sent(form, pickled(family, value))[3])
        assert (ok, type(error)) == (False, RuntimeError)


def test_an_outcome_that_is_no_exception_when_it_is_loaded(family: Family) -> None:
    ok, error = outcome(family, RETURNED, pickled(family, children.Exits()))
    assert (ok, type(error)) == (False, SystemExit)


def test_an_outcome_without_its_descriptors_is_why(family: Family) -> None:
    reason = DescriptorLimit(24, "RLIMIT_NOFILE", 9, None, "receiver")
    with socket.socket() as sock:
        message = headed(RETURNED, 1, 2, pickled(family, [sock]))
        assert isinstance(message, Bundle)
        arrived = Bundle(message.data)
    arrived.missing = reason
    assert outcome(family, RETURNED, beheaded(arrived)[3]) == (False, reason)


def test_what_has_no_head() -> None:
    assert not has_head(Bundle(b""))
    assert not has_head((None,))


def test_nothing_is_held_where_there_is_nothing_to_hold(family: Family) -> None:
    for initargs in ((), (1, [2], {"a": "b"}), (object(),)):
        assert hold_initializer(family, children.keep, initargs) == (children.keep, initargs)
    assert hold_initializer(family, None, (1,)) == (None, (1,))


def test_an_iterator_of_arguments_is_used_once(family: Family) -> None:
    with socket.socket() as sock:
        expected = identity(sock)
        initializer, initargs = hold_initializer(family, children.keep, iter([sock]))
    initializer(*initargs)
    assert [children.identity(obj) for obj in children.KEPT] == [expected]
    children.keep()
    assert hold_initializer(family, children.keep, iter([1])) == (children.keep, (1,))


def test_what_cannot_be_shared_stays_as_it_is(family: Family) -> None:
    near, far = socket.socketpair()
    closed = socket.socket()
    closed.close()
    with near, far, near.makefile("rwb") as both, near.makefile("rb") as ahead:
        far.sendall(b"a\nb")
        assert ahead.readline() == b"a\n"
        initargs = closed, both, [ahead]
        assert hold_initializer(family, children.keep, initargs) == (children.keep, initargs)
        with descriptor_limit_reached(), pytest.raises(DescriptorLimit):
            hold_initializer(family, children.keep, (near,))


@pytest.mark.parametrize("cls", [list, dict])
def test_what_contains_itself_stays_as_it_is_inside(family: Family, cls: type) -> None:
    cycle: Any = cls()
    inside = cycle.setdefault("b", []) if cls is dict else cycle
    inside.append(cycle)
    assert hold_initializer(family, children.keep, (cycle,)) == (children.keep, (cycle,))
    with socket.socket() as sock:
        inside.append(sock)
        initializer, initargs = hold_initializer(family, children.keep, (cycle,))
    initializer(*initargs)
    copy = children.KEPT[0]["b"] if cls is dict else children.KEPT[0]
    assert copy[0] is cycle
    with copy[1] as held:
        assert held.fileno() >= 0
    children.keep()


def test_what_is_held_is_found_in_tuples_lists_and_dicts(family: Family) -> None:
    ctx = get_context("fork", backend=family.package)
    lock = ctx.Lock()
    with socket.socket() as sock, open(os.devnull) as file:
        expected = [identity(sock), identity(file), identity(sock)]
        held = hold_initializer(family, children.keep, (sock, [{"f": file}, 3], (lock, sock)))
    initializer, initargs = held
    initializer(*initargs)
    first, (box, three), (same_lock, last) = children.KEPT
    assert three == 3
    assert same_lock is lock
    assert [identity(obj) for obj in (first, box["f"], last)] == expected
    children.close_all([first, box["f"], last])
    children.keep()
