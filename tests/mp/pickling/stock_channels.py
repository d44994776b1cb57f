"""Descriptors through every channel of a package, with one start method, there and back.

Run by test_install.py as `stock_channels.py PACKAGE METHOD`. Prints the name of each check that
passed.
"""

from __future__ import annotations

import importlib
import os
import pickle
import socket
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest

import fdshare
from fdshare.errors import AlreadyTaken

SECONDS = 30


@dataclass
class Letter:
    """Something of a program's own with descriptors in it."""

    sock: socket.socket
    file: Any
    rest: list[Any]


def same(left: Any, right: Any) -> bool:
    return os.path.sameopenfile(left.fileno(), right.fileno())


def speak(sock: socket.socket, peer: socket.socket) -> None:
    """Fails unless *peer* is the other end of *sock*."""
    sock.sendall(b"hello")
    assert peer.recv(10) == b"hello"


def unlinked(text: str) -> Any:
    file = tempfile.TemporaryFile("w+", encoding="utf-8")
    file.write(text)
    file.seek(0)
    return file


# What the children do


def echo(inbox: Any, outbox: Any) -> None:
    while (message := inbox.get()) is not None:
        outbox.put(message)


def answer(connection: Any) -> None:
    message = connection.recv()
    assert not os.get_inheritable(message.fileno())
    connection.send({"message": message})


def put_and_exit(queue: Any) -> None:
    near, far = socket.socketpair()
    far.sendall(b"from one who is gone")
    queue.put(near)


def put_and_close(queue: Any) -> None:
    near, far = socket.socketpair()
    far.sendall(b"held")
    queue.put(fdshare.hold(near))
    near.close()


def first_line(letter: Letter) -> tuple[str, Letter]:
    letter.sock.sendall(b"read")
    return letter.file.readline(), letter


def keep(sock: socket.socket, both: list[socket.socket], queue: Any) -> None:
    assert both[0] is both[1] is sock
    queue.put(sock)


# The checks


def through_a_queue(ctx: Any) -> None:
    inbox, outbox = ctx.Queue(), ctx.Queue()
    child = ctx.Process(target=echo, args=(inbox, outbox))
    child.start()
    near, far = socket.socketpair()
    near.settimeout(5)
    file = unlinked("one\ntwo\n")
    assert file.readline() == "one\n"
    inbox.put({"letters": [Letter(near, file, [near, 7, {"again": near}])]})
    letter = outbox.get(timeout=SECONDS)["letters"][0]
    assert letter.rest[0] is letter.rest[2]["again"] is letter.sock
    assert letter.sock.gettimeout() == 5
    speak(letter.sock, far)
    assert same(letter.file, file)
    assert letter.file.readline() == "two\n"

    many = [near.dup() for _ in range(301)]
    inbox.put(many)
    back = outbox.get(timeout=SECONDS)
    assert len(back) == 301
    for sock in back:
        speak(sock, far)
    inbox.put(None)
    child.join(SECONDS)


def through_a_simple_queue_and_a_pipe(ctx: Any) -> None:
    queue = ctx.SimpleQueue()
    near, far = socket.socketpair()
    queue.put(near)
    speak(queue.get(), far)
    for duplex in (True, False):
        ours, theirs = ctx.Pipe(duplex)
        theirs.send(near)
        speak(ours.recv(), far)
    ours, theirs = ctx.Pipe()
    child = ctx.Process(target=answer, args=(theirs,))
    child.start()
    reader, writer = ctx.Pipe(duplex=False)
    ours.send(reader)
    writer.send("through a connection that travelled")
    assert ours.recv()["message"].recv() == "through a connection that travelled"
    child.join(SECONDS)


def from_one_who_is_gone(ctx: Any) -> None:
    for sender, said in ((put_and_exit, b"from one who is gone"), (put_and_close, b"held")):
        queue = ctx.Queue()
        child = ctx.Process(target=sender, args=(queue,))
        child.start()
        child.join(SECONDS)
        assert child.exitcode == 0
        assert queue.get(timeout=SECONDS).recv(100) == said


def as_arguments_of_a_process(ctx: Any) -> None:
    queue = ctx.Queue()
    near, far = socket.socketpair()
    child = ctx.Process(target=keep, args=(near, [near, near], queue))
    child.start()
    speak(queue.get(timeout=SECONDS), far)
    child.join(SECONDS)


def through_a_pool(ctx: Any) -> None:
    near, far = socket.socketpair()
    file = unlinked("a\nb\nc\n")
    letters = [Letter(near, file, []) for _ in range(3)]
    with ctx.Pool(1) as pool:
        # One after the other: the letters share one offset, which pickling the next would move.
        found = [pool.apply_async(first_line, (each,)).get(SECONDS) for each in letters]
        assert [line for line, _ in found] == ["a\n", "b\n", "c\n"]
        assert far.recv(100) == b"readreadread"
        for _, letter in found:
            speak(letter.sock, far)
            assert same(letter.file, file)
        if ctx.__module__.startswith("multiprocess."):  # dill: a function that closes over a socket
            assert pool.apply_async(closure(near)).get(SECONDS) == 3
            assert far.recv(10) == b"yes"


def closure(sock: socket.socket) -> Callable[[], int]:
    return lambda: sock.send(b"yes")


def through_an_executor(ctx: Any) -> None:
    if ctx.__module__.startswith("multiprocess."):
        return  # the standard library's executor takes its own package's contexts only
    near, far = socket.socketpair()
    with ProcessPoolExecutor(1, mp_context=ctx) as executor:
        letter = Letter(fdshare.hold(near), unlinked("x\n"), [])  # type: ignore[arg-type]
        future = executor.submit(first_line, letter)
        near.close()
        line, letter = future.result(SECONDS)
    assert line == "x\n"
    assert far.recv(10) == b"read"
    speak(letter.sock, far)


def only_once(ctx: Any) -> None:
    queue = ctx.Queue()
    near, far = socket.socketpair()
    queue.put(near)
    message = queue._reader.recv_bytes()
    speak(pickle.loads(message), far)
    with pytest.raises(AlreadyTaken, match=r"fdshare\.hold\(obj, uses=n\)"):
        pickle.loads(message)


CHECKS = (
    through_a_queue,
    through_a_simple_queue_and_a_pipe,
    from_one_who_is_gone,
    as_arguments_of_a_process,
    through_a_pool,
    through_an_executor,
    only_once,
)


def main(package: str, method: str) -> None:
    ctx = importlib.import_module(package).get_context(method)
    fdshare.install()
    for check in CHECKS:
        check(ctx)
        print(check.__name__, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
