"""Pools: what is held for later workers, results in any order, ends of any kind."""

from __future__ import annotations

import gc
import os
import socket
import tempfile
from typing import Any

import pytest

from fdshare import get_context
from mp import children
from mp.common import METHODS, PACKAGES, identity, trackers  # noqa: F401


@pytest.fixture(params=PACKAGES)
def package(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("method", METHODS)
def test_arguments_of_the_initializer_are_held_for_the_pools_life(
    method: str, package: str
) -> None:
    ctx = get_context(method, backend=package)
    sock = socket.create_server(("127.0.0.1", 0))
    file = tempfile.TemporaryFile("w+")
    file.write("kept!")
    with ctx.Pool(1, children.keep, (sock, {"file": file}), maxtasksperchild=1) as pool:
        sock.close()
        file.close()
        assert [pool.apply(children.read_kept) for _ in range(3)] == ["kept!"] * 3
        pool.close()
        pool.join()


def test_locks_and_queues_as_arguments_of_the_initializer(package: str) -> None:
    for method in ("fork", "spawn"):
        ctx = get_context(method, backend=package)
        queue, lock = ctx.SimpleQueue(), ctx.Lock()
        with socket.socket() as sock:
            pool = ctx.Pool(1, children.keep, ([queue, lock], sock))
        with pool:
            assert pool.apply(len, ([1, 2],)) == 2
            pool.close()
            pool.join()
        queue.close()


def test_every_way_to_ask(package: str) -> None:
    ctx = get_context("fork", backend=package)
    with ctx.Pool(2) as pool, socket.socket() as sock, open(os.devnull) as file:
        things = [sock, file, sock]
        expected = list(map(identity, things))
        assert pool.map(children.identity, things) == expected
        assert list(pool.imap(children.identity, things)) == expected
        assert list(pool.imap(children.identity, iter(things), chunksize=2)) == expected
        assert sorted(pool.imap_unordered(children.identity, things)) == sorted(expected)
        assert pool.starmap(children.identity, [(thing,) for thing in things]) == expected
        assert pool.apply(children.identity, kwds={"obj": sock}) == identity(sock)
        back = pool.map_async(children.same, things).get(30)
        assert list(map(identity, back)) == expected
        children.close_all(back)
        called: list[Any] = []
        pool.apply_async(children.identity, (file,), callback=called.append).wait(30)
        assert called == [identity(file)]
        assert pool.map(len, []) == []
        pool.close()
        pool.join()


def test_imap_pickles_each_item_when_it_is_drawn(package: str) -> None:
    ctx = get_context("fork", backend=package)
    expected = []

    def draw() -> Any:
        for _ in range(10):
            with socket.socket() as sock:
                expected.append(identity(sock))
                yield sock

    with ctx.Pool(2) as pool:
        assert list(pool.imap(children.identity, draw())) == expected
        pool.close()
        pool.join()


def test_an_iterable_that_fails(package: str) -> None:
    ctx = get_context("fork", backend=package)

    def fail() -> Any:
        yield 1
        raise KeyError("in the iterable")

    with ctx.Pool(1) as pool:
        with pytest.raises(KeyError):
            pool.map(children.same, fail())
        results = pool.imap(children.same, fail())
        assert next(results) == 1
        with pytest.raises(KeyError):
            next(results)
        assert pool.apply(children.same, (1,)) == 1
        pool.close()
        pool.join()


def test_terminate_lets_go_of_what_was_submitted(package: str) -> None:
    ctx = get_context("fork", backend=package)
    reader, writer = os.pipe()
    with ctx.Pool(1) as pool, os.fdopen(writer, "wb") as file:
        for _ in range(200):
            pool.apply_async(children.identity, (file,))
    del pool
    gc.collect()  # a pool and the results that it never got are a cycle
    # Workers, queues and results are gone, and with them the last writer.
    assert os.read(reader, 1) == b""
    os.close(reader)


@pytest.mark.parametrize("method", METHODS)
def test_exceptions_show_the_workers_lines(method: str, package: str) -> None:
    ctx = get_context(method, backend=package)
    with ctx.Pool(1) as pool:
        with pytest.raises(KeyError) as caught:
            pool.apply(children.raise_key_error)
        names = [entry.name for entry in caught.traceback]
        assert names[-1] == "raise_key_error"
        assert "from the worker" in str(caught.value.__cause__)
        pool.close()
        pool.join()
