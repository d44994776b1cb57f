"""A context of ours completes as one of multiprocessing does, and may stand where that may."""

from __future__ import annotations

import multiprocessing
import multiprocessing.context
import multiprocessing.queues
import multiprocessing.synchronize
import socket
from multiprocessing.connection import Connection
from multiprocessing.managers import SyncManager
from multiprocessing.pool import AsyncResult, Pool
from multiprocessing.queues import JoinableQueue, Queue, SimpleQueue
from typing import Any, assert_type

import fdshare


def size(text: str) -> int:
    return len(text)


def fill(queue: multiprocessing.queues.Queue[socket.socket], sock: socket.socket) -> None:
    queue.put(sock)


def use_any(context: multiprocessing.context.BaseContext) -> int:
    return context.cpu_count()


def main() -> None:
    context = fdshare.get_context("spawn")
    use_any(context)
    use_any(fdshare.get_context(backend="multiprocess"))
    use_any(fdshare.get_context(backend=multiprocessing))
    use_any(context.get_context("fork"))

    assert_type(context.Queue(3), Queue[Any])
    assert_type(context.JoinableQueue(), JoinableQueue[Any])
    assert_type(context.SimpleQueue(), SimpleQueue[Any])
    assert_type(context.Pipe(duplex=False), tuple[Connection[Any, Any], Connection[Any, Any]])
    assert_type(context.Manager(), SyncManager)
    assert_type(context.Lock(), multiprocessing.synchronize.Lock)
    assert_type(context.Event(), multiprocessing.synchronize.Event)
    assert_type(context.Semaphore(2), multiprocessing.synchronize.Semaphore)
    assert_type(context.get_start_method(), str)

    queue: Queue[socket.socket] = context.Queue()
    with socket.socket() as sock:
        fill(queue, sock)
        process = context.Process(target=fill, args=(queue, sock), daemon=True)
    process.start()
    process.join(10)
    assert_type(process.exitcode, int | None)
    assert_type(queue.get(timeout=1), socket.socket)

    with context.Pool(2, initializer=print, initargs=("started",)) as pool:
        assert_type(pool, Pool)
        assert_type(pool.apply(size, ("text",)), int)
        assert_type(pool.apply_async(size, ("text",)), AsyncResult[int])
        assert_type(pool.map(size, ["a", "b"]), list[int])
