"""The floor in Python: the server of a request and a reply with one descriptor, nothing else.

Usage: pingpong.py plain|epoll SOCKET DESCRIPTOR REPLY-BYTES [COPIES]

*plain* blocks in recv(2), so it serves one client only. *epoll* waits for many, as a server must,
and looks a name up.
"""

from __future__ import annotations

import array
import select
import socket
import sys


def plain(sock: socket.socket, descriptors: list[int], reply: bytes) -> None:
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
    data = [reply]
    while sock.recv(65536):
        sock.sendmsg(data, rights)


def epoll(sock: socket.socket, descriptors: list[int], reply: bytes) -> None:
    sock.setblocking(False)
    waiting = select.epoll()
    waiting.register(sock, select.EPOLLIN)
    clients = {sock.fileno(): sock}
    held = {b"name": (descriptors, [reply])}
    buffer = bytearray(65536)
    while True:
        for number, _ in waiting.poll():
            client = clients[number]
            count, _, _, _ = client.recvmsg_into((buffer,), 1024)
            if not count:
                return
            found, data = held[bytes(buffer[:4])]
            control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", found))]
            client.sendmsg(data, control)


if __name__ == "__main__":
    serve = {"plain": plain, "epoll": epoll}[sys.argv[1]]
    number, descriptor, size, copies = map(int, [*sys.argv[2:], "1"][:4])
    serve(socket.socket(fileno=number), [descriptor] * copies, bytes(size))
