"""Every start method, package, kind and channel with each other."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest
from lambdas import needs_lambdas

from fdshare import Descriptor, ProcessPoolExecutor, get_context
from mp import children
from mp.common import METHODS, PACKAGES, finish, identity, trackers  # noqa: F401

SECONDS = 60


@contextmanager
def a_socket() -> Iterator[Any]:
    left, right = socket.socketpair()
    with left, right:
        yield left


@contextmanager
def a_listener() -> Iterator[Any]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


@contextmanager
def a_text_file() -> Iterator[Any]:
    with tempfile.NamedTemporaryFile("w+", encoding="utf-8") as file:
        file.write("one\ntwo\n")
        file.seek(0)
        assert file.readline() == "one\n"
        yield file.file


@contextmanager
def an_unlinked_file() -> Iterator[Any]:
    with tempfile.TemporaryFile("w+b") as file:
        file.write(b"12345")
        yield file


@contextmanager
def a_pipe_end() -> Iterator[Any]:
    reader, writer = os.pipe()
    with open(reader, "rb") as file, open(writer, "wb"):
        yield file


@contextmanager
def a_pidfd() -> Iterator[Any]:
    with Descriptor(os.pidfd_open(os.getpid())) as pidfd:
        yield pidfd


KINDS: dict[str, Callable[[Any], Any]] = {
    "socket": lambda _: a_socket(),
    "listener": lambda _: a_listener(),
    "text file": lambda _: a_text_file(),
    "unlinked file": lambda _: an_unlinked_file(),
    "pipe end": lambda _: a_pipe_end(),
    "Connection": lambda ctx: connection_of(ctx),
    "pidfd": lambda _: a_pidfd(),
}


@contextmanager
def connection_of(ctx: Any) -> Iterator[Any]:
    left, right = ctx.Pipe()
    with left, right:
        yield left


def check(kind: str, sent: Any, arrived: Any) -> None:
    """Fails unless it is the same thing; closes *arrived*."""
    with closing(arrived):
        assert type(arrived) is type(sent), kind
        assert identity(arrived) == identity(sent), kind
        assert not os.get_inheritable(arrived.fileno()), kind
        if kind == "text file":
            assert arrived.readline() == "two\n"
        if kind == "unlinked file":
            assert arrived.tell() == 5


@pytest.fixture(params=PACKAGES)
def package(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("method", METHODS)
def test_every_kind_through_every_channel(method: str, package: str) -> None:
    ctx = get_context(method, backend=package)
    near, far = ctx.Pipe()
    queues = [(ctx.Queue(), ctx.Queue()), (ctx.SimpleQueue(), ctx.SimpleQueue())]
    processes = [ctx.Process(target=children.echo_connection, args=(far,))]
    processes += [ctx.Process(target=children.echo, args=pair) for pair in queues]
    for process in processes:
        process.start()
    far.close()
    with ctx.Pool(1) as pool, ProcessPoolExecutor(1, ctx) as executor:
        channels: dict[str, Callable[[Any], Any]] = {
            "Pipe": lambda obj: (near.send(obj), near.recv())[1],
            "Queue": lambda obj: (queues[0][0].put(obj), queues[0][1].get(timeout=SECONDS))[1],
            "SimpleQueue": lambda obj: (queues[1][0].put(obj), queues[1][1].get())[1],
            # There as an argument, back as a result.
            "Pool": lambda obj: pool.apply_async(children.same, (obj,)).get(SECONDS),
            "executor": lambda obj: executor.submit(children.same, obj).result(SECONDS),
        }
        for through in channels.values():
            for kind, make in KINDS.items():
                with make(ctx) as obj:
                    check(kind, obj, through(obj))
        pool.close()
        pool.join()
    near.send(None)
    for inbox, _ in queues:
        inbox.put(None)
    for process in processes:
        process.join(SECONDS)
        assert process.exitcode == 0
    near.close()
    for pair in queues:
        for queue in pair:
            finish(queue)


@pytest.mark.parametrize("method", METHODS)
def test_every_kind_as_process_arguments(method: str, package: str) -> None:
    ctx = get_context(method, backend=package)
    answers = ctx.SimpleQueue()
    with (
        a_socket() as sock,
        a_listener() as listener,
        a_text_file() as text,
        an_unlinked_file() as unlinked,
        a_pipe_end() as end,
        connection_of(ctx) as connection,
        a_pidfd() as pidfd,
    ):
        things = [sock, listener, text, unlinked, end, connection, pidfd]
        process = ctx.Process(target=children.answer, args=(answers, *things))
        process.start()
        assert [answers.get() for _ in things] == list(map(identity, things))
        process.join(SECONDS)
    finish(answers)


@pytest.mark.parametrize("method", METHODS)
def test_every_kind_through_a_stock_executor(method: str, package: str) -> None:
    """concurrent.futures' own, with our context: both ways, if open until it has run."""
    from concurrent.futures import ProcessPoolExecutor as Stock

    ctx = get_context(method, backend=package)
    with Stock(1, mp_context=ctx) as executor:
        for kind, make in KINDS.items():
            with make(ctx) as obj:
                check(kind, obj, executor.submit(children.same, obj).result(SECONDS))


@pytest.mark.parametrize("method", METHODS)
def test_what_a_manager_keeps(method: str, package: str) -> None:
    ctx = get_context(method, backend=package)
    with ctx.Manager() as manager:
        queue, mapping, items = manager.Queue(), manager.dict(), manager.list()
        with a_listener() as listener:
            process = ctx.Process(target=children.put, args=(queue, listener))
            process.start()
            process.join(SECONDS)
            assert process.exitcode == 0
            check("listener", listener, queue.get(timeout=SECONDS))
            mapping["it"] = listener
            items.append([listener])
            check("listener", listener, mapping["it"])
            check("listener", listener, items[0][0])


DILL = """
import socket, sys, tempfile
from fdshare import get_context, ProcessPoolExecutor

def main():
    ctx = get_context(sys.argv[1], backend="multiprocess")
    left, right = socket.socketpair()
    file = tempfile.TemporaryFile("w+")
    file.write("kept")
    file.seek(2)

    def reach():
        left.send(b"from a closure")
        return file.read()

    with ctx.Pool(1) as pool, ProcessPoolExecutor(1, ctx) as executor:
        assert pool.apply(lambda: reach()) == "pt"
        assert right.recv(99) == b"from a closure"
        file.seek(1)
        assert executor.submit(lambda: reach()).result() == "ept"
        assert right.recv(99) == b"from a closure"
        assert pool.apply(lambda: (lambda x: x + 1))(1) == 2
        pool.close()
        pool.join()
    left.close(), right.close(), file.close()
    print("ok")

if __name__ == "__main__":
    main()
"""


@needs_lambdas
@pytest.mark.parametrize("method", METHODS)
def test_lambdas_and_closures_that_contain_sockets_and_files(method: str, folder: Any) -> None:
    (folder / "program.py").write_text(DILL)
    command = [sys.executable, str(folder / "program.py"), method]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "ok\n", done.stderr
