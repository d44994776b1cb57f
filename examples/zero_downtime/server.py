"""A plain http.server that takes its socket from its service manager and stops gracefully."""

from __future__ import annotations

import os
import signal
import threading
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
    # shutdown() waits for serve_forever(), which a signal handler has interrupted.
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
    fdshare.notify("READY=1")
    server.serve_forever(poll_interval=0.05)
    server.server_close()


if __name__ == "__main__":
    main()
