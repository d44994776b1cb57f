"""A server's stats as Prometheus text (exposition format 0.0.4), and over HTTP.

https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from __future__ import annotations

import errno
import socket
import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Final

from fdshare.errors import InvalidArgument
from fdshare.protocol.messages import ServerStats

__all__ = ["MetricsEndpoint", "parse_host_port", "render"]

_GAUGES: Final = {
    "uptime": ("uptime_seconds", "Seconds since this server process started."),
    "names": ("names", "Names held."),
    "descriptors": ("descriptors", "Descriptors held."),
    "leases": ("leases", "Takes that are not confirmed yet."),
    "connections": ("connections", "Clients connected."),
    "in_flight": ("in_flight_descriptors", "Descriptors sent and not yet received."),
    "generation": ("generation", "The last generation that was given."),
}
_PATIENCE: Final = 5.0  # seconds that a client gets for its request, and the loop for an answer
_MOST: Final = 8192  # bytes of a request


def render(stats: ServerStats) -> str:
    """*stats* as Prometheus text."""
    lines: list[str] = []
    for field, (name, text) in _GAUGES.items():
        lines += _family(name, "gauge", text, [("", getattr(stats, field))])
    lines += _family(
        "redundant", "gauge", "1 if either half may die now.", [("", int(stats.redundant))]
    )
    if stats.store is not None:
        lines += _family(
            "stored_descriptors",
            "gauge",
            "Descriptors that the service manager holds.",
            [("", stats.store.descriptors)],
        )
        lines += _family(
            "missing_names",
            "gauge",
            "Names that the service manager does not hold.",
            [("", stats.store.missing)],
        )
    lines += _family(
        "log_dropped_total",
        "counter",
        "Lines of the log that are lost: it was not read in time.",
        [("", stats.log_dropped)],
    )
    lines += _family(
        "limit",
        "gauge",
        "The limits of the server.",
        [(f'{{name="{name}"}}', value) for name, value in stats.limits.items()],
    )
    for name, value in stats.counters.items():
        lines += _family(f"{name}_total", "counter", _COUNTERS.get(name, name), [("", value)])
    return "\n".join(lines) + "\n"


_COUNTERS: Final = {
    "requests": "Requests read.",
    "refused": "Requests refused.",
    "registered": "Entries registered.",
    "fetched": "Entries given to a fetch.",
    "taken": "Entries taken for good.",
    "returned": "Entries back from a taker that let go.",
    "expired": "Entries whose time had passed.",
    "accepted": "Connections accepted.",
    "evicted": "Idle connections closed to make room.",
}


def _family(name: str, kind: str, text: str, samples: list[tuple[str, float]]) -> Iterator[str]:
    yield f"# HELP fdshare_{name} {text}"
    yield f"# TYPE fdshare_{name} {kind}"
    for labels, value in samples:
        yield f"fdshare_{name}{labels} {value:.15g}"


def parse_host_port(text: str) -> tuple[str, int]:
    """(host, port) of "127.0.0.1:9100" or "[::1]:9100". Raises: InvalidArgument."""
    host, colon, port = text.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise InvalidArgument("metrics", f"{text!r} is not HOST:PORT")
    return host.strip("[]") or "127.0.0.1", int(port)


class MetricsEndpoint:
    """A thread that answers each HTTP request on *address* with the text of `stats()`.

    *post* has a call made by the thread that may call `stats`. One request at a time, each within a
    few seconds: the server is not slowed down.
    """

    def __init__(
        self,
        address: str,
        stats: Callable[[], ServerStats],
        post: Callable[[Callable[[], None]], None],
    ) -> None:
        """Listens. Raises: InvalidArgument; OSError of bind(2)."""
        host, port = parse_host_port(address)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._stats = stats
        self._post = post
        # SO_REUSEADDR is set: a successor binds while connections of its predecessor linger.
        self._sock = socket.create_server((host, port), family=family, backlog=16)
        self._sock.settimeout(None)
        self.port: int = self._sock.getsockname()[1]
        self._thread = threading.Thread(target=self._run, name="fdshare-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stops listening, and waits for the thread, at most a few seconds."""
        try:
            self._sock.shutdown(socket.SHUT_RDWR)  # wakes accept(2) on Linux
        except OSError:
            pass
        self._thread.join(_PATIENCE)
        self._sock.close()

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self._sock.accept()
            except OSError as error:
                if self._sock.fileno() < 0 or not _passing(error):
                    return
                threading.Event().wait(0.1)
                continue
            with connection:
                try:
                    connection.settimeout(_PATIENCE)
                    self._answer(connection)
                except OSError:
                    pass  # the client is gone, or too slow

    def _answer(self, connection: socket.socket) -> None:
        request = b""
        while b"\r\n\r\n" not in request and len(request) < _MOST:
            part = connection.recv(_MOST)
            if not part:
                return
            request += part
        method, _, rest = request.partition(b" ")
        path = rest.split(b" ", 1)[0].partition(b"?")[0]
        if method not in (b"GET", b"HEAD"):
            status, body = "405 Method Not Allowed", b""
        elif path not in (b"/", b"/metrics"):
            status, body = "404 Not Found", b"the metrics are at /metrics\n"
        else:
            status, body = "200 OK", self._text().encode()
        head = (
            f"HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        connection.sendall(head.encode() + (b"" if method == b"HEAD" else body))

    def _text(self) -> str:
        """The loop's thread calls `stats`: no other may look at its table."""
        answers: SimpleQueue[ServerStats] = SimpleQueue()
        self._post(lambda: answers.put(self._stats()))
        try:
            return render(answers.get(timeout=_PATIENCE))
        except Exception:
            raise OSError("the server is busy") from None


def _passing(error: OSError) -> bool:
    """True for a failure of accept(2) after which the next may succeed."""
    return error.errno in (errno.EMFILE, errno.ENFILE, errno.ECONNABORTED, errno.ENOMEM)
