"""A pre-forked HTTP server: one process accepts, a queue passes the connections to its workers.

    $ python prefork_server.py --workers 3
    127.0.0.1:8080: pid 4030 accepts, 3 workers answer

    $ curl http://127.0.0.1:8080/what
    GET /what was answered by worker 4031

    $ kill 4030
    stopping: what was accepted is answered first
    4031 answered 17 requests
    4032 answered 16 requests
    4033 answered 17 requests

The queue of `fdshare.get_context()` accepts a socket like a number. The socket is in the queue when
`put` returns, so the acceptor closes its own at once, and a worker that is killed loses only the
request that it was answering. `maxsize` bounds how many connections wait in the queue.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
from http.server import BaseHTTPRequestHandler
from typing import Any

import fdshare

IDLE = 5  # seconds that a client may take


class Handler(BaseHTTPRequestHandler):
    """The standard library's handler, on a connection that another process accepted."""

    timeout = IDLE
    answered = 0

    def do_GET(self) -> None:
        body = f"{self.command} {self.path} was answered by worker {os.getpid()}\n".encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        Handler.answered += 1

    do_POST = do_GET

    def log_message(self, *_: Any) -> None:
        pass


def work(connections: Any) -> None:
    """A worker: answers until the queue says None."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the acceptor says when to end
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while (connection := connections.get()) is not None:
        with connection:
            try:
                Handler(connection, connection.getpeername(), None)  # type: ignore[arg-type]
            except OSError:
                pass  # the client has closed
    print(f"{os.getpid()} answered {Handler.answered} requests", flush=True)


def accept(listener: socket.socket, connections: Any) -> None:
    """Passes accepted connections to the workers, until SIGTERM or Ctrl-C."""
    stopping = False

    def stop(*_: object) -> None:
        nonlocal stopping
        stopping = True
        listener.shutdown(socket.SHUT_RDWR)  # ends accept(), and no connection

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            if not stopping:
                raise
            break
        with connection:
            connections.put(connection)
    print("stopping: what was accepted is answered first", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="A pre-forked HTTP server.")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--method", default="spawn", choices=["fork", "spawn", "forkserver"])
    options = parser.parse_args()

    context = fdshare.get_context(options.method)
    connections = context.Queue(maxsize=64)
    workers = [context.Process(target=work, args=(connections,)) for _ in range(options.workers)]
    for worker in workers:
        worker.start()
    with socket.create_server(("127.0.0.1", options.port), backlog=128) as listener:
        host, port = listener.getsockname()
        print(
            f"{host}:{port}: pid {os.getpid()} accepts, {options.workers} workers answer",
            flush=True,
        )
        accept(listener, connections)
    for _ in workers:
        connections.put(None)
    for worker in workers:
        worker.join()


if __name__ == "__main__":
    main()
