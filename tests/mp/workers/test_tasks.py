"""Tasks and outcomes: opened by their own job, whatever it costs."""

from __future__ import annotations

import os
import socket
from typing import Any

import pytest

from fdshare import get_context
from fdshare.mp.backends import backend_of
from fdshare.mp.family import Family
from fdshare.mp.pickling.reducers import dumps
from fdshare.mp.workers.tasks import Outcome, Task, hold_initializer
from mp import children
from mp.common import PACKAGES, identity, open_now, trackers  # noqa: F401


@pytest.fixture(params=PACKAGES)
def family(request: pytest.FixtureRequest) -> Family:
    return backend_of(request.param).FAMILY


def through(family: Family, obj: Any) -> Any:
    return dumps(family, obj).own().load(family.loads)


def test_a_task_is_its_call(family: Family) -> None:
    with socket.socket() as sock:
        task = Task.of(family, children.identity, (sock,), {})
        expected = identity(sock)
    assert through(family, ("job", task))[1]() == expected


def test_a_task_that_nobody_runs_closes(family: Family) -> None:
    with socket.socket() as sock:
        before = open_now()
        Task.of(family, children.identity, (sock,), {})
        assert open_now() == before


def test_an_outcome(family: Family) -> None:
    with socket.socket() as sock:
        outcome = through(family, Outcome.of(family, True, sock))
        ok, arrived = outcome.open(family)
        with arrived:
            assert ok
            assert identity(arrived) == identity(sock)
    ok, error = through(family, Outcome.of(family, True, children.Bomb())).open(family)
    assert (ok, type(error)) == (False, RuntimeError)


def test_nothing_is_held_where_there_is_nothing_to_hold(family: Family) -> None:
    for initargs in ((), (1, [2], {"a": "b"}), (object(),)):
        assert hold_initializer(family, children.keep, initargs) == (children.keep, initargs)
    assert hold_initializer(family, None, (1,)) == (None, (1,))


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
