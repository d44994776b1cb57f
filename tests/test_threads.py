"""What threads may share, used from many of them at once: with the GIL off as with it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from mp.common import METHODS, trackers  # noqa: F401
from nursery import Manager

import fdshare

THREADS = 8
TURNS = 15


def in_threads(work: Callable[[int], None], turns: int = TURNS) -> None:
    """Calls *work* with the number of the thread, *turns* times in each, all at the same time."""
    barrier = threading.Barrier(THREADS)
    failures: list[BaseException] = []

    def loop(number: int) -> None:
        barrier.wait()
        try:
            for _ in range(turns):
                work(number)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=loop, args=(n,), daemon=True) for n in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    if failures:
        raise failures[0]


def inode(sock: Any) -> int:
    return os.fstat(sock.fileno()).st_ino


def inode_and_close(sock: socket.socket) -> int:
    with sock:
        return inode(sock)


@pytest.fixture
def sock() -> Iterator[socket.socket]:
    near, far = socket.socketpair()
    with near, far:
        yield near


@pytest.mark.skipif(
    not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="a Python that has the GIL"
)
def test_fdshare_leaves_the_gil_off() -> None:
    """What it says on stderr is of the extension that does not: msgspec before 0.20."""
    code = (
        "import sys, fdshare; fdshare.Manager, fdshare.get_context(); print(sys._is_gil_enabled())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_one_follower() -> None:
    """Each thread replaces the object, and sees no older one than its own from then on."""
    numbers: dict[int, int] = {}  # inode -> generation

    with Manager() as manager, ExitStack() as files:
        held = [files.enter_context(tempfile.TemporaryFile()) for _ in range(THREADS * TURNS)]
        manager.register("log", held[0])
        log = files.enter_context(manager.follow("log"))

        def work(number: int) -> None:
            with log.lease() as leased:
                mine = held.pop()
                generation = manager.register("log", mine, replace=True).generation
                numbers[inode(mine)] = generation
                current = log.current
                assert not current.closed
                assert not leased.closed
                assert numbers.get(inode(current), generation) >= generation
            files.callback(mine.close)

        in_threads(work)


def test_one_client(sock: socket.socket) -> None:
    with Manager() as manager, fdshare.connect(manager.address) as client:
        client.register("shared", sock)

        def work(number: int) -> None:
            name = f"own/{number}"
            client.register(name, sock)
            client.rename(name, f"{name}/x")
            for made in (client.take(f"{name}/x"), client.fetch("shared")):
                assert inode(made) == inode(sock)
                made.close()
            try:
                client.register("wanted by all", sock)
            except fdshare.NameTaken:
                pass
            try:
                client.take("wanted by all").close()
            except fdshare.NameNotFound:
                pass

        in_threads(work)


@pytest.mark.parametrize("kind", ["Queue", "JoinableQueue", "SimpleQueue"])
def test_one_queue(sock: socket.socket, kind: str) -> None:
    queue = getattr(fdshare.get_context("fork"), kind)()
    got: list[int] = []

    def work(number: int) -> None:
        queue.put((number, sock))
        theirs, made = queue.get()
        got.append(theirs)
        assert inode_and_close(made) == inode(sock)
        if kind == "JoinableQueue":
            queue.task_done()

    in_threads(work)
    assert sorted(got) == sorted(list(range(THREADS)) * TURNS)
    if kind == "JoinableQueue":
        queue.join()
    queue.close()
    if kind != "SimpleQueue":
        queue.join_thread()


@pytest.mark.parametrize("method", METHODS)
def test_one_pool_and_one_executor(sock: socket.socket, method: str) -> None:
    context = fdshare.get_context(method)
    with context.Pool(2) as pool, fdshare.ProcessPoolExecutor(2, context) as executor:
        executor.submit(abs, 1).result()  # its workers are there before the threads

        def work(number: int) -> None:
            later = [pool.apply_async(inode_and_close, [sock]) for _ in range(3)]
            future = executor.submit(inode_and_close, sock)
            found = [future.result(60), pool.apply(inode_and_close, [sock])]
            assert {*found, *(one.get(60) for one in later)} == {inode(sock)}

        in_threads(work, 5)
        pool.close()
        pool.join()


def test_one_private_server(sock: socket.socket) -> None:
    """Through a standard queue."""
    import multiprocessing

    fdshare.install()
    queue = multiprocessing.get_context("fork").SimpleQueue()

    def work(number: int) -> None:
        queue.put(sock)
        assert inode_and_close(queue.get()) == inode(sock)

    try:
        in_threads(work)
    finally:
        fdshare.uninstall()
        queue.close()


def test_one_descriptor_that_all_close(sock: socket.socket) -> None:
    """It is closed once: the number may be another's by the second time."""
    kept = [fdshare.Descriptor.dup_of(sock) for _ in range(TURNS)]
    numbers = iter(range(TURNS * THREADS))
    in_threads(lambda _: kept[next(numbers) % TURNS].close())
    assert all(one.closed for one in kept)


def test_names_that_are_imported_by_their_first_use() -> None:
    """In all threads at once, of a new interpreter."""
    code = (
        "import threading, fdshare\n"
        "barrier, failures = threading.Barrier(8), []\n"
        "def work():\n"
        "    barrier.wait()\n"
        "    try:\n"
        "        for name in fdshare.__all__: getattr(fdshare, name)\n"
        "        context = fdshare.get_context('fork')\n"
        "        for name in ('Pool', 'SyncManager', 'Queue', 'CallQueue'):\n"
        "            found.add(getattr(context._classes, name))\n"
        "    except BaseException as error: failures.append(repr(error))\n"
        "found = set()\n"
        "threads = [threading.Thread(target=work) for _ in range(8)]\n"
        "for thread in threads: thread.start()\n"
        "for thread in threads: thread.join()\n"
        "print(failures, len(found))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("[] 4\n", "")
