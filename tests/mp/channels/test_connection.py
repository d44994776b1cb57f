"""Connections, Pipe, Listener and Client."""

from __future__ import annotations

import gc
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel.pairs import HOARD

from fdshare import get_context
from fdshare.errors import DescriptorLimit, NoTransit
from fdshare.mp.backends import backend_of
from mp import children
from mp.common import (
    METHODS,
    PACKAGES,
    descriptor_limit_reached,
    identity,
    open_now,
    trackers,  # noqa: F401
)


@pytest.fixture(params=PACKAGES)
def classes(request: pytest.FixtureRequest) -> Any:
    return backend_of(request.param).CLASSES


@pytest.fixture
def pipe(classes: Any) -> Iterator[tuple[Any, Any]]:
    left, right = classes.Pipe()
    with left, right:
        yield left, right


def test_it_is_a_connection_of_the_package(pipe: tuple[Any, Any]) -> None:
    left, _ = pipe
    stock = left._family.connection.Connection
    assert isinstance(left, stock)
    assert left.readable
    assert left.writable
    assert left.fileno() > 0


def test_one_way(classes: Any) -> None:
    reader, writer = classes.Pipe(duplex=False)
    with reader, writer:
        writer.send(1)
        assert reader.recv() == 1
        with pytest.raises(OSError, match="read-only"):
            reader.send(1)
        with pytest.raises(OSError, match="write-only"):
            writer.recv()


def test_poll_and_wait(pipe: tuple[Any, Any]) -> None:
    left, right = pipe
    assert not right.poll()
    assert not right.poll(-1)
    assert not right.poll(0.01)
    assert wait([right], 0.01) == []
    left.send(3)
    assert right.poll(None)
    assert wait([left, right], 5) == [right]
    assert right.recv() == 3


def test_what_cannot_be_unpickled_is_gone(pipe: tuple[Any, Any]) -> None:
    left, right = pipe
    for bomb in (children.Bomb(), children.Bomb(left)):
        left.send(bomb)
        left.send("next")
        with pytest.raises(RuntimeError, match="exploded"):
            right.recv()
        assert right.recv() == "next"


def test_the_end(pipe: tuple[Any, Any]) -> None:
    left, right = pipe
    left.send("last")
    left.close()
    assert left.closed
    with pytest.raises(OSError, match="closed"):
        left.send(1)
    assert right.poll()
    assert right.recv() == "last"
    assert right.poll()
    with pytest.raises(EOFError):
        right.recv()
    with pytest.raises(BrokenPipeError):
        right.send(1)


def test_bytes(pipe: tuple[Any, Any]) -> None:
    left, right = pipe
    left.send_bytes(b"0123456789", 2, 5)
    assert right.recv_bytes() == b"23456"
    left.send_bytes(memoryview(b"abcdef"))
    buffer = bytearray(10)
    assert right.recv_bytes_into(buffer, 3) == 6
    assert buffer == b"\0\0\0abcdef\0"
    left.send_bytes(b"")
    assert right.recv_bytes() == b""
    left.send_bytes(b"too long")
    with pytest.raises(OSError, match="bad message length"):
        right.recv_bytes(maxlength=3)


def test_large_messages(pipe: tuple[Any, Any]) -> None:
    left, right = pipe
    data = os.urandom(1 << 20) * 16
    thread = threading.Thread(target=lambda: (left.send_bytes(data), left.send(data)))
    thread.start()
    assert right.recv_bytes() == data
    assert right.recv() == data
    thread.join()


@settings(max_examples=15)
@given(st.lists(st.sampled_from(["int", "socket", "both", "limit"]), max_size=16))
def test_whatever_was_expected_what_comes_is_received(kinds: list[str]) -> None:
    classes = backend_of("multiprocessing").CLASSES
    left, right = classes.Pipe()
    with left, right, socket.socket() as sock:
        item = {"int": 1, "socket": sock, "both": [sock, 2, sock], "limit": sock}
        for kind in kinds:
            left.send(item[kind])
        for kind in kinds:
            if kind == "limit":
                with descriptor_limit_reached(), pytest.raises(DescriptorLimit):
                    right.recv()
            got = right.recv()
            if kind == "int":
                assert got == 1
                continue
            first = got[0] if kind == "both" else got
            assert identity(first) == identity(sock)
            if kind == "both":
                assert got == [first, 2, first]
            first.close()


AT_THE_LIMIT = """
import os
import fdshare
from fdshare.errors import DescriptorLimit
from fdshare.mp.backends import backend_of

reader, writer = backend_of({package!r}).CLASSES.Pipe(False)
if not os.fork():
    {send}
    os._exit(0)
os.wait()
held = hoard(64)
for _ in range({free}):
    os.close(held.pop())
for _ in range({tries}):
    try:
        reader.recv()
    except DescriptorLimit as error:
        print(error.whose)
for fd in held:
    os.close(fd)
print(type(reader.recv()).__name__, reader.poll())
"""


def at_the_limit(package: str, send: str, free: int, tries: int) -> str:
    """What a new process says that receives what another one did *send*, while *free* descriptors
    are, some *tries*, and once later."""
    code = HOARD + AT_THE_LIMIT.format(package=package, send=send, free=free, tries=tries)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert not done.stderr
    return done.stdout


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize(
    ("send", "name"),
    [
        ("writer.send(fdshare.SharedMemory(4096))", "SharedMemory"),
        ("writer.send(fdshare.SharedMemory(4096).as_array())", "ndarray"),
        ("writer.send(open(os.devnull, encoding='cp1006'))", "TextIOWrapper"),
    ],
)
def test_what_takes_an_import_stays_at_the_limit(package: str, send: str, name: str) -> None:
    """Its descriptor was the last that was free, and a module is a file to open."""
    said = at_the_limit(package, send, free=1, tries=2)
    assert said == f"receiver\nreceiver\n{name} False\n"


def test_what_is_made_in_part_is_gone_at_the_limit() -> None:
    send = "writer.send([open(os.devnull), fdshare.SharedMemory(4096)]); writer.send(b'next')"
    said = at_the_limit("multiprocessing", send, free=2, tries=1)
    assert said == "receiver\nbytes False\n"


def test_collected_together_they_close_once(classes: Any) -> None:
    before = open_now()
    for _ in range(10):
        left, right = classes.Pipe()
        left.send(1)
        right.recv()
        left.cycle, right.cycle = right, left
        del left, right
        gc.collect()
    assert open_now() == before


def test_a_default_timeout_does_not_touch_it(classes: Any) -> None:
    socket.setdefaulttimeout(0.001)
    try:
        left, right = classes.Pipe()
        with left, right:
            threading.Timer(0.05, lambda: left.send(5)).start()
            assert right.recv() == 5
            assert os.get_blocking(right.fileno())
    finally:
        socket.setdefaulttimeout(None)


def test_over_a_pipe_it_does_what_the_package_does(classes: Any) -> None:
    reader, writer = os.pipe()
    with (
        classes.Connection(reader, writable=False) as left,
        classes.Connection(writer, readable=False) as right,
    ):
        right.send({"a": 1})
        assert left.poll(1)
        assert left.recv() == {"a": 1}
        right.send_bytes(b"bytes")
        assert left.recv_bytes() == b"bytes"
        with pytest.raises(NoTransit):
            right._own_sender()


@pytest.mark.parametrize("authkey", [None, b"secret"])
def test_listener_and_client_at_a_path(classes: Any, folder: Path, authkey: bytes | None) -> None:
    with classes.Listener(str(folder / "sock"), authkey=authkey) as listener:
        thread = threading.Thread(target=_answer, args=(listener,))
        thread.start()
        with (
            classes.Client(listener.address, authkey=authkey) as client,
            socket.socket() as sock,
        ):
            client.send([sock])
            with client.recv() as arrived:
                assert identity(arrived) == identity(sock)
        thread.join()


def _answer(listener: Any) -> None:
    with listener.accept() as connection:
        (sock,) = connection.recv()
        with sock:
            connection.send(sock)


def test_listener_and_client_over_tcp_carry_what_the_package_carries(classes: Any) -> None:
    with classes.Listener(("127.0.0.1", 0)) as listener:
        accepted = []
        thread = threading.Thread(target=lambda: accepted.append(listener.accept()))
        thread.start()
        with classes.Client(listener.address) as client:
            thread.join()
            with accepted[0] as connection:
                client.send({"plain": 1})
                assert connection.recv() == {"plain": 1}
                with (
                    open(os.devnull) as file,
                    classes.Pipe()[0] as end,
                    pytest.raises((TypeError, NoTransit)),
                ):
                    client.send([end, file])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("package", PACKAGES)
def test_a_connection_through_a_connection_to_a_process(package: str, method: str) -> None:
    ctx = get_context(method, backend=package)
    near, far = ctx.Pipe()
    process = ctx.Process(target=children.echo_connection, args=(far,))
    process.start()
    far.close()
    with near:
        left, right = ctx.Pipe()
        with left:
            near.send(right)
            right.close()
            with near.recv() as arrived:
                assert type(arrived) is type(left)
                arrived.send("there")
                assert left.recv() == "there"
        near.send(None)
        process.join()
    assert process.exitcode == 0
