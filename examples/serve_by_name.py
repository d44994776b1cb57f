"""Serve HTTP on a listener that another program bound, and that this one fetches by name.

register_listener.py says how to start the rendezvous server and how to register a listener. Then,
in as many terminals as you like:

    $ python serve_by_name.py /tmp/demo.sock
    pid 4022 serves 127.0.0.1:8080

    $ curl http://127.0.0.1:8080/
    hello from pid 4022

All of them serve the same port. Each may be stopped at any time with Ctrl-C: it answers what it has
accepted, and the others get the rest. If it starts before the listener is registered, it waits.
"""

from __future__ import annotations

import argparse
import os
import select
import signal
import socket

import fdshare


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve HTTP on a listener fetched by its name.")
    parser.add_argument("path", nargs="?", help="socket of the rendezvous server")
    parser.add_argument("--name", default="web")
    options = parser.parse_args()

    with fdshare.connect(options.path) as rendezvous:
        listener = rendezvous.fetch(options.name, timeout=60)
    with listener:
        host, port = listener.getsockname()
        stop = stop_signals()
        print(f"pid {os.getpid()} serves {host}:{port}", flush=True)
        serve(listener, stop)


def stop_signals() -> socket.socket:
    """Becomes readable with Ctrl-C or SIGTERM, so that neither interrupts an answer."""
    stop, waker = socket.socketpair()
    waker.setblocking(False)
    signal.set_wakeup_fd(waker.detach())
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    return stop


def serve(listener: socket.socket, stop: socket.socket) -> None:
    # Other processes accept from it, too, and may be faster; they share the flag.
    listener.setblocking(False)
    while stop not in select.select([listener, stop], [], [])[0]:
        try:
            connection, _ = listener.accept()
        except BlockingIOError:
            continue
        answer(connection)


def answer(connection: socket.socket) -> None:
    body = f"hello from pid {os.getpid()}\n"
    with connection:
        connection.settimeout(5)
        try:
            connection.recv(65536)
            connection.sendall(
                f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n"
                f"Connection: close\r\n\r\n{body}".encode()
            )
        except OSError:
            pass  # the client has closed, or never asked


if __name__ == "__main__":
    main()
