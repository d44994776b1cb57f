"""The short way of a fetch brings what is held now, and ends as the long one does."""

from __future__ import annotations

import io
import os
import resource
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from nursery import Manager

from fdshare.client import verbs
from fdshare.client.blocking.client import Client
from fdshare.client.conversation import Exchange, WholeAnswer
from fdshare.client.fetch_cache import FetchCache
from fdshare.errors import DescriptorLimit, NameNotFound, ServerTimeout
from fdshare.kernel.ancillary import close_all
from fdshare.protocol import messages as m
from fdshare.protocol.framing import header
from fdshare.protocol.kind import Kind


@pytest.fixture
def files() -> Iterator[list[int]]:
    fds = [os.memfd_create("a"), os.memfd_create("b")]
    yield fds
    for fd in fds:
        os.close(fd)


def inode(client: Client, name: str) -> int:
    with client.fetch(name) as found:
        return os.fstat(found.fileno()).st_ino


def known(client: Client) -> set[str | tuple[str, ...]]:
    """The names, or names together, that the client's connections know the short way to."""
    return {name for connection in client._idle for name in connection._cache}


def test_second_fetch_is_of_the_same_file(client: Client, files: list[int]) -> None:
    client.register("x", files[0])
    for _ in range(3):
        assert inode(client, "x") == os.fstat(files[0]).st_ino
        assert known(client) == {"x"}
        (found,) = client.fetch_raw("x")
        with found:
            assert os.fstat(found.fileno()).st_ino == os.fstat(files[0]).st_ino


def test_names_that_are_fetched_together(client: Client, files: list[int]) -> None:
    """In one connection, with single fetches between them."""
    client.register("x", files[0])
    client.register("y", files[1])
    one, other = (os.fstat(fd).st_ino for fd in files)

    def inodes(*names: str) -> dict[str, int]:
        found = client.fetch_many(names)
        numbers = {name: os.fstat(each.fileno()).st_ino for name, each in found.items()}
        close_all(found.values())
        return numbers

    for _ in range(3):
        assert inodes("x", "y") == {"x": one, "y": other}
        assert inodes("y", "x", "y") == {"y": other, "x": one}
        assert inode(client, "x") == one
    assert known(client) == {"x", ("x", "y"), ("y", "x")}
    client.register("x", files[1], replace=True)
    assert [inodes("x", "y") for _ in range(2)] == [{"x": other, "y": other}] * 2
    with open(os.dup(files[0]), "rb") as file:
        client.register("x", file, replace=True)
    for _ in range(2):
        found = client.fetch_many(["x", "y"])
        assert isinstance(found["x"], io.BufferedReader)
        for each in found.values():
            each.close()
    client.unregister("y")
    for _ in range(2):
        with pytest.raises(NameNotFound) as caught:
            client.fetch_many(["x", "y"])
        assert caught.value.names == ["y"]


def test_a_look_is_no_fetch(client: Client, files: list[int]) -> None:
    """What is remembered of it would not be counted either."""
    client.register("x", files[0])
    close_all(client._do(verbs.look_raw("x")))
    inode(client, "x")
    assert client.info("x").fetches == 1


def test_it_brings_what_is_held_now(client: Client, server: Any, files: list[int]) -> None:
    one, other = (os.fstat(fd).st_ino for fd in files)
    client.register("x", files[0])
    assert [inode(client, "x") for _ in range(2)] == [one, one]
    with Client(server.address) as another:
        another.register("x", files[1], replace=True)
        assert [inode(client, "x") for _ in range(2)] == [other, other]
        another.rename("x", "y")
        with pytest.raises(NameNotFound):
            client.fetch("x")
        assert inode(client, "y") == other
        another.register("x", files[0])
        assert [inode(client, name) for name in "xyxy"] == [one, other] * 2


def test_a_lost_connection_is_made_again(client: Client, files: list[int]) -> None:
    client.register("x", files[0])
    inode(client, "x")
    connection = client._idle[0]
    assert connection._sock is not None
    connection._sock.shutdown(2)
    assert inode(client, "x") == os.fstat(files[0]).st_ino
    assert connection.opened == 2
    assert [inode(client, "x") for _ in range(2)] == [os.fstat(files[0]).st_ino] * 2


def test_a_killed_server_is_found_again(files: list[int]) -> None:
    with Manager() as manager:
        manager.register("x", files[0])
        inode(manager, "x")
        os.kill(manager.stats().server_pid, signal.SIGKILL)
        assert inode(manager, "x") == os.fstat(files[0]).st_ino


def test_a_server_that_stands_still_is_a_timeout(
    serve: Callable[..., Manager], files: list[int]
) -> None:
    manager = serve()
    manager.register("x", files[0])
    manager.register("y", files[1])
    with Client(manager.address, timeout=0.2) as client:
        inode(client, "x")
        pid = client.stats().server_pid
        os.kill(pid, signal.SIGSTOP)
        try:
            with pytest.raises(ServerTimeout) as caught:
                client.fetch("x")
        finally:
            os.kill(pid, signal.SIGCONT)
        assert caught.value.timeout == pytest.approx(0.2)
        # The late answer is nobody's, and not that of another request.
        assert inode(client, "y") == os.fstat(files[1]).st_ino


def test_at_the_descriptor_limit(client: Client, files: list[int]) -> None:
    client.register("x", files[0])
    client.register("y", files[1])
    inode(client, "x")
    close_all(client.fetch_many(["x", "y"]).values())
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        for _ in range(2):
            with pytest.raises(DescriptorLimit):
                client.fetch("x")
            with pytest.raises(DescriptorLimit):
                client.fetch_many(["x", "y"])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert inode(client, "x") == os.fstat(files[0]).st_ino


def test_what_is_no_name_is_refused_as_ever(client: Client, files: list[int]) -> None:
    client.register("x", files[0])
    for _ in range(2):
        for wrong in ("", "a\nb", [], None, 3):
            with pytest.raises((ValueError, TypeError)):
                client.fetch(wrong)  # type: ignore[arg-type]
    assert known(client) <= {"x"}


REPLY = m.Given("x", 1, Kind("descriptor", m.msgspec.Raw(b"\xc0")))


def frames(id: int = 7, count: int = 0) -> tuple[bytes, bytes]:
    asked, answered = m.encode(m.Fetch("x", 0)), m.encode(REPLY)
    return (
        header(len(asked), 0, id) + asked,
        header(len(answered), count, id) + answered,
    )


def test_frames_are_stamped_with_the_id() -> None:
    cache = FetchCache()
    request, answer = frames(7)
    cache.learn(Exchange(m.Fetch("x", 0)), request, memoryview(answer), WholeAnswer([REPLY]))
    assert cache["x"].stamped(7) == frames(7)
    assert cache["x"].stamped(0xFFFFFFFF) == frames(0xFFFFFFFF)


def test_what_it_remembers_is_bounded() -> None:
    cache = FetchCache()
    request, answer = frames()
    answer += bytes(1000)
    most = 0
    for number in range(3000):
        exchange = Exchange(m.Fetch(f"n/{number}", 0))
        cache.learn(exchange, request, memoryview(answer), WholeAnswer([REPLY]))
        assert f"n/{number}" in cache
        most = max(most, len(cache))
    assert 500 < most <= 1024
