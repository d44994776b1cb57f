"""Wrong uses of an executor and of hold()."""

from __future__ import annotations

import socket

import fdshare


def use(sock: socket.socket) -> int:
    return sock.fileno()


executor = fdshare.ProcessPoolExecutor()
wrong: str = executor.submit(use, socket.socket()).result()  # refused
executor.submit(use, 3)  # refused
executor.submit(use)  # refused
executor.submit(use, socket.socket(), 4)  # refused
executor.submit(use, other=socket.socket())  # refused
executor.submit(use, fdshare.hold(3))  # refused
fdshare.ProcessPoolExecutor(mp_context="spawn")  # refused
fdshare.ProcessPoolExecutor(threads=3)  # refused
fdshare.hold(socket.socket(), uses="once")  # refused
fdshare.hold(socket.socket()).nothing()  # refused
