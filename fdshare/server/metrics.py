"""A server's stats as Prometheus text (exposition format 0.0.4).

https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from fdshare.errors import InvalidArgument
from fdshare.protocol.messages import ServerStats

__all__ = ["parse_host_port", "render"]

_GAUGES: Final = {
    "uptime": ("uptime_seconds", "Seconds since this server process started."),
    "names": ("names", "Names held."),
    "descriptors": ("descriptors", "Descriptors held."),
    "leases": ("leases", "Takes that are not confirmed yet."),
    "connections": ("connections", "Clients connected."),
    "dying": ("dying_processes", "Processes of the server that hang in their end."),
    "in_flight": ("in_flight_descriptors", "Descriptors sent and not yet received."),
    "generation": ("generation", "The last generation that was given."),
}


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
