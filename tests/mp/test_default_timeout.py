"""A program with socket.setdefaulttimeout(): no channel takes it, and no wait of another process
is cut short by it."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fdshare
from fdshare import ProcessPoolExecutor, get_context
from mp import children
from mp.common import METHODS, PACKAGES, finish, identity, trackers  # noqa: F401


@pytest.fixture(params=[10.0, 0.0], autouse=True)
def default(request: pytest.FixtureRequest) -> Iterator[None]:
    socket.setdefaulttimeout(request.param)
    yield
    socket.setdefaulttimeout(None)


@pytest.fixture(params=[(p, m) for p in PACKAGES for m in METHODS], ids=" ".join)
def ctx(request: pytest.FixtureRequest) -> Any:
    package, method = request.param
    return get_context(method, backend=package)


def test_both_ends_of_every_channel_still_block(ctx: Any) -> None:
    queue, simple = ctx.Queue(), ctx.SimpleQueue()
    left, right = ctx.Pipe()
    try:
        for channel in (queue, simple):
            channel.put("opens it")
            assert channel.get() == "opens it"
        left.send("opens it")
        assert right.recv() == "opens it"
        for end in (queue._reader, queue._writer, simple._reader, simple._writer, left, right):
            assert os.get_blocking(end.fileno())
    finally:
        finish(queue)
        finish(simple)
        left.close()
        right.close()


def test_a_child_waits_for_what_comes_and_sends_what_is_large(ctx: Any) -> None:
    inbox, outbox = ctx.Queue(), ctx.SimpleQueue()
    child = ctx.Process(target=children.echo, args=(inbox, outbox))
    child.start()
    large = b"x" * (1 << 20)
    inbox.put(large)
    assert outbox.get() == large
    with socket.socket() as sock:
        sock.settimeout(None)
        inbox.put(sock)
        with outbox.get() as arrived:
            assert identity(arrived) == identity(sock)
            assert arrived.gettimeout() is None
        assert os.get_blocking(sock.fileno())
    inbox.put(None)
    child.join()
    assert child.exitcode == 0
    finish(inbox)
    finish(outbox)


def test_workers_of_pools_and_executors_stay(ctx: Any) -> None:
    with ctx.Pool(1) as pool:
        first = pool.apply(os.getpid)
        assert pool.map(abs, [-1, -2]) == [1, 2]
        assert pool.apply(os.getpid) == first
    with ProcessPoolExecutor(1, ctx) as executor:
        assert list(executor.map(abs, [-1, -2])) == [1, 2]


def test_a_managers_server_answers(ctx: Any) -> None:
    with ctx.Manager() as manager:
        shared = manager.list([1])
        shared.append(2)
        assert list(shared) == [1, 2]


def test_installed_channels_park_what_they_carry() -> None:
    from multiprocessing import get_context as stock

    queue = stock("fork").Queue()
    fdshare.install()
    try:
        with socket.socket() as sock:
            sock.settimeout(None)
            queue.put(sock)
            with queue.get() as arrived:
                assert identity(arrived) == identity(sock)
            assert os.get_blocking(sock.fileno())
    finally:
        fdshare.uninstall()
        finish(queue)


def test_a_server_of_names_starts_and_serves(tmp_path: Path) -> None:
    with fdshare.Manager(tmp_path / "server") as manager, socket.socket() as sock:
        sock.settimeout(None)
        manager.register("one", sock, lifetime="connection")
        with manager.fetch("one") as fetched:
            assert identity(fetched) == identity(sock)
        assert manager.info("one").name == "one"
        with manager.take("one") as taken:
            assert identity(taken) == identity(sock)
        assert os.get_blocking(sock.fileno())
