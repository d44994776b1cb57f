"""submit() gives a future of what its function returns, and checks its arguments."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import socket
from concurrent.futures import Future
from typing import assert_type

import fdshare


def port(sock: socket.socket, *, offset: int = 0) -> int:
    number: int = sock.getsockname()[1]
    return number + offset


def main() -> None:
    with socket.socket() as sock, fdshare.ProcessPoolExecutor(2) as executor:
        assert_type(executor.submit(port, sock), Future[int])
        assert_type(executor.submit(port, sock, offset=1).result(), int)
        assert_type(executor.submit(port, fdshare.hold(sock)).result(), int)
        assert_type(list(executor.map(port, [sock])), list[int])

    stock: concurrent.futures.Executor = fdshare.ProcessPoolExecutor(
        mp_context=fdshare.get_context("spawn"),
        initializer=print,
        initargs=("started",),
        max_tasks_per_child=3,
    )
    stock.shutdown()
    fdshare.ProcessPoolExecutor(1, multiprocessing.get_context("fork")).shutdown()
    ours = fdshare.get_context("fork")
    concurrent.futures.ProcessPoolExecutor(mp_context=ours).shutdown()
