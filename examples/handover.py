"""Deploy a new version of a server without refusing one connection: it fetches the listener of the
old one, by name.

    $ fdshare serve /tmp/demo.sock &
    $ python handover.py /tmp/demo.sock --version 1 &
    version 1 (pid 4051) bound 127.0.0.1:8080

    $ curl http://127.0.0.1:8080/
    version 1

    $ python handover.py /tmp/demo.sock --version 2
    version 2 (pid 4052) took 127.0.0.1:8080 over
    version 1 (pid 4051) has drained and ends

The listener never closes, so no client is refused at any moment. The new version registers itself
in place of the old one. The old one notices that, stops accepting, answers what it has accepted,
and ends.
"""

from __future__ import annotations

import argparse
import os
import select
import signal
import socket
import threading
from typing import Any

import fdshare
from fdshare.errors import NameNotFound

NAME = "handover/listener"
TURN = "handover/turn"  # the version whose pipe is here serves; when it is replaced, it stops


def listener_of(rendezvous: Any, port: int) -> tuple[socket.socket, str]:
    """The listener that the old version registered, or a new one."""
    try:
        return rendezvous.fetch(NAME), "took {} over"
    except NameNotFound:
        listener = socket.create_server(("127.0.0.1", port))
        rendezvous.register(NAME, listener)
        return listener, "bound {}"


def take_turn(rendezvous: Any) -> int:
    """A descriptor that hangs up when the next version has registered itself.

    The server holds the only writing end of a pipe; replacing the entry closes it.
    """
    reader, writer = os.pipe()
    rendezvous.register(TURN, writer, replace=True)
    os.close(writer)
    return reader


def serve(listener: socket.socket, turn: int, version: str) -> None:
    """Answers until it is another version's turn."""
    listener.setblocking(False)
    threads = []
    while True:
        ready, _, _ = select.select([listener, turn], [], [])
        if turn in ready:
            break
        try:
            connection, _ = listener.accept()
        except BlockingIOError:
            continue  # another version was faster
        thread = threading.Thread(target=answer, args=(connection, version))
        thread.start()
        threads.append(thread)
    for thread in threads:
        thread.join()


def answer(connection: socket.socket, version: str) -> None:
    with connection:
        connection.settimeout(5)
        try:
            connection.recv(65536)
            connection.sendall(
                f"HTTP/1.1 200 OK\r\nContent-Length: {len(version) + 9}\r\n"
                f"Connection: close\r\n\r\nversion {version}\n".encode()
            )
        except OSError:
            pass  # the client has closed, or never asked


def main() -> None:
    parser = argparse.ArgumentParser(description="Take a listener over from the former version.")
    parser.add_argument("path", nargs="?", help="socket of the rendezvous server")
    parser.add_argument("--version", default="1")
    parser.add_argument("--port", type=int, default=8080)
    options = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)

    with fdshare.connect(options.path) as rendezvous:
        listener, how = listener_of(rendezvous, options.port)
        with listener:
            host, port = listener.getsockname()
            who = f"version {options.version} (pid {os.getpid()})"
            turn = take_turn(rendezvous)
            print(who, how.format(f"{host}:{port}"), flush=True)
            serve(listener, turn, options.version)
            print(who, "has drained and ends", flush=True)


if __name__ == "__main__":
    main()
