"""An acceptor that passes each accepted connection to a multiprocessing.Pool: the socket is an
ordinary argument, after one line, `fdshare.install()`.

    $ python pool_of_connections.py
    127.0.0.1:8080: one process accepts, 3 workers answer

    $ curl http://127.0.0.1:8080/what
    /what was answered by worker 4031

`fdshare.hold(connection)` duplicates the connection at the call, so that the acceptor may close its
own at once: the standard pool pickles its arguments a little later, in a thread. End with Ctrl-C.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import socket

import fdshare


def answer(connection: socket.socket) -> str:
    """In a worker: *connection* is an ordinary socket, and its only owner is this call."""
    with connection:
        connection.settimeout(5)
        request = connection.recv(65536).decode("latin-1")
        path = request.split(" ")[1] if " " in request else "nothing"
        body = f"{path} was answered by worker {os.getpid()}\n"
        connection.sendall(
            f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n"
            f"Connection: close\r\n\r\n{body}".encode()
        )
    return body


def main() -> None:
    parser = argparse.ArgumentParser(description="Hand accepted connections to a pool.")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--workers", type=int, default=3)
    options = parser.parse_args()

    fdshare.install()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with (
        multiprocessing.Pool(
            options.workers, signal.signal, (signal.SIGINT, signal.SIG_IGN)
        ) as pool,
        socket.create_server(("127.0.0.1", options.port)) as listener,
    ):
        host, port = listener.getsockname()
        print(f"{host}:{port}: one process accepts, {options.workers} workers answer", flush=True)
        try:
            while True:
                connection, _ = listener.accept()
                with connection:
                    pool.apply_async(answer, (fdshare.hold(connection),), error_callback=print)
        except KeyboardInterrupt:
            pass
        pool.close()  # the workers answer what was accepted
        pool.join()


if __name__ == "__main__":
    main()
