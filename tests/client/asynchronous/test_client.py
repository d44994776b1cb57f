"""The asynchronous client where it differs: its own life, and what frameworks take."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from conftest import census
from nursery import Manager

import fdshare
from fdshare.client.blocking.client import Client
from fdshare.errors import (
    ClosedDescriptor,
    FetchTimeout,
    InvalidArgument,
)

BACKENDS = pytest.mark.parametrize("backend", ["asyncio", "trio"])


# Its own life


def test_import_fdshare_does_not_import_anyio() -> None:
    code = (
        "import sys, fdshare; assert 'anyio' not in sys.modules; "
        "fdshare.Client, fdshare.Manager, fdshare.ref; assert 'anyio' not in sys.modules; "
        "fdshare.aio.connect; assert 'anyio' in sys.modules; import fdshare.aio"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@BACKENDS
def test_entered_once(server: Any, backend: str) -> None:
    async def main() -> None:
        client = fdshare.aio.connect(server.address)
        with pytest.raises(ClosedDescriptor, match="async with"):
            await client.ping()
        async with client:
            with pytest.raises(InvalidArgument):
                await client.__aenter__()
        with pytest.raises(InvalidArgument):
            await client.__aenter__()

    anyio.run(main, backend=backend)


@BACKENDS
def test_cancelled_while_it_connects(folder: Any, backend: str) -> None:
    async def main() -> None:
        before = census()
        with anyio.move_on_after(0.05):
            async with fdshare.aio.connect(folder / "silent"):
                raise AssertionError
        assert census() == before

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "silent"))
        listener.listen()
        anyio.run(main, backend=backend)


@BACKENDS
def test_a_full_backlog_is_waited_for(server: Any, folder: Any, backend: str) -> None:
    """connect(2) says EAGAIN then, and the client must not block its loop over it."""

    async def main() -> None:
        path = str(folder / "full")
        with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
            listener.bind(path)
            listener.listen(0)
            first.connect(path)
            with anyio.move_on_after(0.1) as scope:
                async with fdshare.aio.connect(path, timeout=None):
                    raise AssertionError
            assert scope.cancelled_caught

    anyio.run(main, backend=backend)


@BACKENDS
def test_a_connection_that_the_server_drops_is_opened_again(pipe: int, backend: str) -> None:
    """The door is full, so the longest idle client of this uid has to go."""

    async def main() -> None:
        async with fdshare.aio.connect(manager.address) as mine:
            await mine.register("x", pipe, lifetime="connection")
            for _ in range(3):
                others = [fdshare.connect(manager.address) for _ in range(6)]
                for other in others:
                    other.close()
                (await mine.fetch("x")).close()
            assert (await mine.stats()).counters["evicted"] > 0

    with Manager(keeper=False, limits={"max_connections": 4}) as manager:
        anyio.run(main, backend=backend)


@BACKENDS
def test_what_was_done_for_a_reader_that_was_too_slow_is_done_once(
    pipe: int, backend: str, until: Callable[..., Any]
) -> None:
    """Its loop was busy with something else; the server gave up on it with answers unsent."""

    async def main() -> None:
        async with fdshare.aio.connect(manager.address) as mine:
            with fdshare.connect(manager.address) as other:
                for i in range(1000):
                    other.register(f"{i:04}".ljust(250, "-"), pipe)
                connections = other.stats().connections
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(mine.names)  # its answer is more than the socket holds
                    tasks.start_soon(mine.register, "one", pipe)
                    tasks.start_soon(mine.rename, "0000".ljust(250, "-"), "two")
                    while not all(call.sent for call in mine._pipeline._pending.values()) or (
                        len(mine._pipeline._pending) < 3
                    ):
                        await anyio.lowlevel.checkpoint()
                    until(lambda: "two" in other, "both changes are made")
                    until(lambda: other.stats().connections < connections, "it is dropped")
                assert other.stats().generation == 1002
                assert {"one", "two"} <= set(other.names())

    limits = {"request_timeout": 0.3}
    with Manager(keeper=False, limits=limits) as manager:
        anyio.run(main, backend=backend)


@BACKENDS
def test_a_watch_that_is_dropped_ends_at_the_server(
    server: Any, client: Client, pipe: int, backend: str
) -> None:
    async def main() -> None:
        async with fdshare.aio.connect(server.address) as mine:
            watch = mine.watch()
            await anext(watch)
            del watch
            client.register("x", pipe)
            with anyio.fail_after(20):
                while mine._pipeline._pending:
                    await anyio.lowlevel.checkpoint()

    anyio.run(main, backend=backend)


@BACKENDS
def test_a_watch_that_is_dropped_leaves_its_place_to_the_next(backend: str) -> None:
    """Also if nothing ever happens to its names: after 4,096 of them no watch was possible."""

    async def main() -> None:
        async with fdshare.aio.connect(manager.address) as mine:
            for _ in range(3):
                async for _ in mine.watch("quiet"):
                    break
            with pytest.raises(FetchTimeout):
                await mine.wait("quiet", timeout=0.01)

    with Manager(keeper=False, limits={"max_waiting": 1}) as manager:
        anyio.run(main, backend=backend)


def test_a_forked_child_leaves_the_connection_alone(server: Any, pipe: int) -> None:
    async def main() -> None:
        async with fdshare.aio.connect(server.address) as mine:
            await mine.register("x", pipe, lifetime="connection")
            pid = os.fork()
            if not pid:
                os._exit(0 if mine._closed and mine._lifeline._ends is None else 1)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
            assert await mine.names() == ["x"]

    asyncio.run(main())


@BACKENDS
def test_two_clients_in_two_threads(server: Any, pipe: int, backend: str) -> None:
    async def main(name: str) -> None:
        async with fdshare.aio.connect(server.address) as mine:
            for _ in range(50):
                await mine.register(name, pipe, replace=True)
                (await mine.take(name)).close()

    async def both() -> None:
        async with anyio.create_task_group() as tasks:
            for name in ("a", "b"):
                tasks.start_soon(anyio.to_thread.run_sync, run, name)

    def run(name: str) -> None:
        anyio.run(main, name, backend=backend)

    anyio.run(both)


# What frameworks take


def test_a_listener_for_asyncio_start_server(server: Any) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.readline())
        writer.close()

    async def main() -> None:
        async with fdshare.aio.connect(server.address) as client:
            listener = await client.bind("echo", "tcp://127.0.0.1:0")
            port = listener.getsockname()[1]
            async with await asyncio.start_server(answer, sock=listener):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(b"hello\n")
                assert await reader.read() == b"hello\n"
                writer.close()
                await writer.wait_closed()

    asyncio.run(main())


def test_a_listener_for_trio(server: Any) -> None:
    import trio

    async def answer(stream: trio.SocketStream) -> None:
        await stream.send_all(await stream.receive_some(100))

    async def main() -> None:
        async with fdshare.aio.connect(server.address) as client:
            sock = await client.bind("echo", "tcp://127.0.0.1:0")
            listener = trio.SocketListener(trio.socket.from_stdlib_socket(sock))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.serve_listeners, answer, [listener])
                stream = await trio.open_tcp_stream("127.0.0.1", sock.getsockname()[1])
                async with stream:
                    await stream.send_all(b"hello")
                    assert await stream.receive_some(100) == b"hello"
                nursery.cancel_scope.cancel()

    trio.run(main)


def test_an_accepted_connection_leaves_a_running_server(server: Any, client: Client) -> None:
    """Registered before its transport is closed, it is open for whoever fetches it."""
    passed: list[bytes] = []

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        passed.append(await reader.readexactly(6))  # with a StreamReader, all that it has read
        writer.transport.pause_reading()
        async with fdshare.aio.connect(server.address) as mine:
            await mine.register("passed", writer.get_extra_info("socket"))
        writer.transport.abort()

    async def main() -> None:
        listening = await asyncio.start_server(pass_on, "127.0.0.1", 0)
        async with listening:
            address = listening.sockets[0].getsockname()
            reader, writer = await asyncio.open_connection(*address)
            writer.write(b"first\n")
            async with fdshare.aio.connect(server.address) as mine:
                sock = await mine.take("passed", timeout=20)
            assert type(sock) is socket.socket
            writer.write(b"second")
            there, here = await asyncio.open_connection(sock=sock)
            assert await there.readexactly(6) == b"second"
            here.write(b"answer")
            assert await reader.readexactly(6) == b"answer"
            for end in (writer, here):
                end.close()
                await end.wait_closed()
            assert passed == [b"first\n"]

    asyncio.run(main())


def test_a_trio_socket_is_shared_as_a_socket(server: Any) -> None:
    import trio

    async def main() -> None:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        async with listener, fdshare.aio.connect(server.address) as client:
            await client.register("web", listener.socket)
            with await client.fetch("web") as fetched:
                assert type(fetched) is socket.socket
                assert fetched.getsockname() == listener.socket.getsockname()
                assert fetched.gettimeout() == 0

    trio.run(main)


def test_a_connection_for_connect_accepted_socket(server: Any) -> None:
    async def main() -> None:
        ours, theirs = socket.socketpair()
        async with fdshare.aio.connect(server.address) as client:
            with theirs:
                await client.register("accepted", theirs)
            sock = await client.take("accepted")
            loop = asyncio.get_running_loop()
            received = loop.create_future()

            class Protocol(asyncio.Protocol):
                def data_received(self, data: bytes) -> None:
                    received.set_result(data)

            with ours:
                transport, _ = await loop.connect_accepted_socket(Protocol, sock)
                ours.sendall(b"hello")
                assert await received == b"hello"
                transport.close()
                await asyncio.sleep(0)

    asyncio.run(main())


@BACKENDS
def test_another_event_loop_is_told(server: Any, client: Client, backend: str) -> None:
    """Nothing would wake its tasks: they waited for ever."""
    with socket.socket() as sock:
        client.register("a", sock)

    async def main() -> None:
        async with fdshare.aio.connect(server.address, timeout=None) as asynchronous:
            log = asynchronous.follow("a")
            await log.current()
            client.unregister("a")

            async def watch() -> None:
                async with asynchronous.watch() as changes:
                    await anext(changes)

            for call in (asynchronous.names, log.current, watch):
                with pytest.raises(InvalidArgument, match="another event loop"):
                    await anyio.to_thread.run_sync(
                        lambda call=call: anyio.run(call, backend=backend)
                    )
            assert await asynchronous.names() == []

    anyio.run(main, backend=backend)


def test_a_client_is_closed_after_its_event_loop(server: Any) -> None:
    before, asynchronous = census(), fdshare.aio.connect(server.address)
    loop = asyncio.new_event_loop()
    loop.run_until_complete(asynchronous.__aenter__())
    loop.close()
    asyncio.run(asynchronous.close())
    del loop, asynchronous
    gc.collect()
    assert census() == before
