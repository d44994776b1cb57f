"""Requests without end, each on a new connection: a client that must not notice a deploy.

Prints a JSON object at the end (SIGTERM, Ctrl-C, or after so many seconds): requests that were
answered, connections that were refused, requests that failed otherwise, and the versions that
answered.

    python load.py http://127.0.0.1:8080/ --connections 8 --seconds 10 --rate 500
"""

from __future__ import annotations

import argparse
import json
import signal
import socket
import threading
from collections import Counter
from urllib.parse import urlsplit


class Load:
    """The outcomes of all requests."""

    def __init__(self, host: str, port: int, pause: float) -> None:
        self.address = host, port
        self.pause = pause  # of each connection after a request, in seconds
        self.stop = threading.Event()
        self.lock = threading.Lock()
        self.answered = 0
        self.refused = 0
        self.failed: Counter[str] = Counter()
        self.versions: Counter[str] = Counter()

    def run(self) -> None:
        """One connection after the other."""
        while not self.stop.is_set():
            try:
                with socket.create_connection(self.address, timeout=30) as sock:
                    answer = ask(sock)
            except ConnectionRefusedError:
                with self.lock:
                    self.refused += 1
            except OSError as error:
                with self.lock:
                    self.failed[type(error).__name__] += 1
            else:
                with self.lock:
                    self.count(answer)
            if self.pause:
                self.stop.wait(self.pause)

    def count(self, answer: bytes) -> None:
        head, _, body = answer.partition(b"\r\n\r\n")
        if b" 200 " in head.split(b"\r\n")[0] and body.startswith(b"version "):
            self.answered += 1
            self.versions[body.decode().strip()] += 1
        else:
            self.failed["no answer" if not answer else "a wrong answer"] += 1


def ask(sock: socket.socket) -> bytes:
    sock.sendall(b"GET / HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n")
    answer = b""
    while part := sock.recv(4096):
        answer += part
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--connections", type=int, default=8)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--rate", type=float, help="requests a second, at most; else all it can")
    options = parser.parse_args()
    url = urlsplit(options.url)
    pause = options.connections / options.rate if options.rate else 0.0
    load = Load(url.hostname or "127.0.0.1", url.port or 80, pause)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: load.stop.set())
    threads = [threading.Thread(target=load.run) for _ in range(options.connections)]
    for thread in threads:
        thread.start()
    print("running", flush=True)
    load.stop.wait(options.seconds)
    load.stop.set()
    for thread in threads:
        thread.join()
    del load.stop, load.lock
    print(json.dumps(vars(load)))


if __name__ == "__main__":
    main()
