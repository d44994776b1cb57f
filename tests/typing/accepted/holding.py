"""hold(obj) may stand wherever *obj* may: what arrives is the object."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import socket
from io import TextIOWrapper
from pathlib import Path
from typing import assert_type

import fdshare


def use(sock: socket.socket) -> int:
    return sock.fileno()


def main() -> None:
    fdshare.install()
    queue: multiprocessing.Queue[socket.socket] = multiprocessing.Queue()
    with socket.socket() as sock:
        assert_type(fdshare.hold(sock), socket.socket)
        queue.put(fdshare.hold(sock, uses=3))
        with concurrent.futures.ProcessPoolExecutor() as executor:
            assert_type(executor.submit(use, fdshare.hold(sock)).result(), int)
    with Path("notes").open() as file:
        assert_type(fdshare.hold(file, newline=""), TextIOWrapper)
    fdshare.uninstall()
