"""MetricsEndpoint: answers HTTP requests for the metrics, in the event loop.

Whoever can reach the address may ask. One connection is accepted in a turn; a few are open at once,
and the oldest of them is closed for a new one, or when its time is over. So neither a client that
drips nor many of them keep another one waiting.
"""

from __future__ import annotations

import socket
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from fdshare.protocol.messages import ServerStats
from fdshare.server.loop.closing import close_quietly
from fdshare.server.loop.loop import Loop
from fdshare.server.loop.poller import READ, WRITE
from fdshare.server.metrics import parse_host_port, render

__all__ = ["MetricsEndpoint"]

_PATIENCE: Final = 5.0  # seconds that a client gets for its request, and for the answer
_AT_ONCE: Final = 16  # clients
_MOST: Final = 8192  # bytes of a request
_PAUSE: Final = 0.1  # seconds after an accept(2) that failed


class _Scrape:
    """One client: what it has said, or what it is still to be sent."""

    __slots__ = ("data", "sock", "until")

    def __init__(self, sock: socket.socket, until: float) -> None:
        self.sock = sock
        self.until = until
        self.data = b""


class MetricsEndpoint:
    """Listens on *address*, and answers with the text of `stats()`."""

    def __init__(self, address: str, stats: Callable[[], ServerStats], loop: Loop) -> None:
        """Raises: InvalidArgument; OSError of bind(2)."""
        host, port = parse_host_port(address)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._stats = stats
        self._loop = loop
        # SO_REUSEADDR is set: a successor binds while connections of its predecessor linger.
        self._sock = socket.create_server((host, port), family=family, backlog=16)
        self._sock.setblocking(False)
        self.port: int = self._sock.getsockname()[1]
        self._scrapes: OrderedDict[_Scrape, None] = OrderedDict()  # in the order of `until`
        self._timed = False  # `_end_late` is to be called
        self._listen(0.0)

    def close(self) -> None:
        """Listens no more, and closes what is open."""
        self._loop.poller.unregister(self._sock.fileno())
        close_quietly(self._sock)
        for scrape in list(self._scrapes):
            self._end(scrape)

    def _listen(self, now: float) -> None:
        if self._sock.fileno() >= 0:
            self._loop.poller.register(self._sock.fileno(), READ, self._on_connect)

    def _on_connect(self, events: int, now: float) -> None:
        try:
            sock, _ = self._sock.accept()
        except BlockingIOError:
            return
        except OSError:  # no descriptor is free, or the client has gone already
            self._loop.poller.unregister(self._sock.fileno())
            self._loop.later(_PAUSE, self._listen)
            return
        sock.setblocking(False)
        if len(self._scrapes) >= _AT_ONCE:
            self._end(next(iter(self._scrapes)))
        scrape = _Scrape(sock, now + _PATIENCE)
        self._scrapes[scrape] = None
        self._loop.poller.register(sock.fileno(), READ, lambda *_: self._read(scrape))
        if not self._timed:
            self._timed = True
            self._loop.later(_PATIENCE, self._end_late)

    def _end_late(self, now: float) -> None:
        self._timed = False
        for scrape in list(self._scrapes):
            if scrape.until > now:
                self._timed = True
                self._loop.later(scrape.until - time.monotonic(), self._end_late)
                return
            self._end(scrape)

    def _end(self, scrape: _Scrape) -> None:
        if scrape in self._scrapes:  # else it was closed for another one in this turn
            del self._scrapes[scrape]
            self._loop.poller.unregister(scrape.sock.fileno())
            close_quietly(scrape.sock)

    def _read(self, scrape: _Scrape) -> None:
        try:
            part = scrape.sock.recv(_MOST)
        except BlockingIOError:
            return
        except OSError:
            part = b""
        scrape.data += part
        if not part:
            self._end(scrape)
        elif b"\r\n\r\n" in scrape.data or len(scrape.data) >= _MOST:
            scrape.data = self._answer(scrape.data)
            self._loop.poller.unregister(scrape.sock.fileno())
            self._loop.poller.register(scrape.sock.fileno(), WRITE, lambda *_: self._write(scrape))
            self._write(scrape)

    def _write(self, scrape: _Scrape) -> None:
        try:
            scrape.data = scrape.data[scrape.sock.send(scrape.data) :]
        except BlockingIOError:
            return
        except OSError:
            scrape.data = b""
        if not scrape.data:
            self._end(scrape)

    def _answer(self, request: bytes) -> bytes:
        method, _, rest = request.partition(b" ")
        path = rest.split(b" ", 1)[0].partition(b"?")[0]
        if method not in (b"GET", b"HEAD"):
            status, body = "405 Method Not Allowed", b""
        elif path not in (b"/", b"/metrics"):
            status, body = "404 Not Found", b"the metrics are at /metrics\n"
        else:
            status, body = "200 OK", render(self._stats()).encode()
        head = (
            f"HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        return head.encode() + (b"" if method == b"HEAD" else body)
