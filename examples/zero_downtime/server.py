"""A plain http.server that takes its socket from its service manager and stops gracefully."""

from __future__ import annotations

import os
import select
import signal
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import fdshare

BODY = f"version {os.environ.get('VERSION', '0')}\n".encode()


class Handler(BaseHTTPRequestHandler):
    timeout = 10  # seconds for a client to send its request

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        self.wfile.write(BODY)

    def log_message(self, format: str, *args: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    # It answers what it has accepted: server_close() waits for the threads.
    daemon_threads = False


def main() -> None:
    [web] = fdshare.listen_fds()["web"]
    server = Server(("", 0), Handler, bind_and_activate=False)
    server.socket.close()
    server.socket = web.socket()
    # Another version shares the socket and may accept first: then accept() must not block.
    server.socket.setblocking(False)
    stopped = False

    def stop(*_: object) -> None:
        # Nothing more: shutdown() needs a thread, and the signal may interrupt the start of one.
        nonlocal stopped
        stopped = True

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    fdshare.notify("READY=1")
    while not stopped:
        if select.select([server], [], [], 0.05)[0]:
            server.handle_request()
    server.server_close()


if __name__ == "__main__":
    main()
