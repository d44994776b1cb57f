"""The limits of a server. Their defaults depend on RLIMIT_NOFILE; each can be set."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

import msgspec

from fdshare.errors import InvalidArgument

__all__ = ["RESERVE", "Limits", "refuse_too_large", "usable"]

# Descriptors that no limit counts on: the listener, epoll, the journal, the log, files that are
# open for a moment, one connection for an administrator, and what the interpreter has open.
RESERVE: Final = 32
_LARGEST: Final = (1 << 63) - 1  # what msgpack carries: to clients, and to new code


def usable(nofile: int) -> int:
    """How many of *nofile* descriptors the limits count on."""
    return max(nofile - RESERVE, 16)


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Counts, bytes and seconds. A limit for each uid does not apply to root and the server's
    uid; for the others it shrinks with what others use (see users.py)."""

    max_descriptors: int
    max_names: int
    max_connections: int
    max_names_per_uid: int
    max_descriptors_per_uid: int
    max_connections_per_uid: int
    max_open_per_uid: int  # descriptors that are open because of it, its connections among them
    in_flight_per_connection: int
    in_flight_per_uid: int
    in_flight: int
    max_buffered: int = 256 << 20  # bytes of half-sent and waiting requests, and unread answers
    max_buffered_per_uid: int = 64 << 20
    max_remembered: int = 256 << 20  # bytes of answers kept for clients that may repeat a request
    max_remembered_per_uid: int = 64 << 20
    max_output: int = 4 << 20  # bytes queued for one connection before it is closed
    max_waiting: int = 4096  # requests of one connection that wait for a name
    max_watches_per_uid: int = 1024
    max_patterns_per_uid: int = 128  # of watches, with wildcards: each is tried at every change
    request_timeout: float = 30.0  # seconds for a half-sent request, or an unread answer
    lease_timeout: float = 60.0  # seconds for a take to be confirmed
    session_timeout: float = 300.0  # seconds in which a client may come back and repeat a request
    journal_timeout: float = 2.0  # seconds a change may wait for the keeper
    hang_timeout: float = 15.0  # seconds the server may not answer its keeper before it is replaced

    @classmethod
    def for_rlimit(cls, nofile: int, **changed: float | int) -> Limits:
        """What fits into *nofile* descriptors: a quarter for connections, an eighth for what is in
        no entry, the rest for entries.

        *changed* replaces single limits. Half of *nofile* at most is ever in flight: the kernel
        counts what was sent and not yet read against the whole user (unix(7), ETOOMANYREFS).
        Raises: InvalidArgument: there is no such limit, or its value is not a number above zero, or
        has more than 63 bits.
        """
        refuse_too_large(changed)
        for name, value in changed.items():
            if name not in cls.__struct_fields__:
                raise InvalidArgument("limits", f"there is no limit {name!r}")
            if not isinstance(value, (int, float)) or not value > 0:
                raise InvalidArgument("limits", f"{name} is {value!r}, not a number above zero")
            if not name.endswith("_timeout") and value % 1 != 0:  # nor of what has no end
                raise InvalidArgument("limits", f"{name} is {value!r}, not a whole number")
        numbers = usable(nofile)
        connections = max(numbers // 4, 4)
        descriptors = numbers - connections - max(numbers // 8, 2)
        defaults: dict[str, float | int] = {
            "max_descriptors": descriptors,
            "max_names": descriptors,
            "max_connections": connections,
            "max_names_per_uid": descriptors // 2,
            "max_descriptors_per_uid": descriptors // 2,
            "max_connections_per_uid": max(connections // 2, 2),
            "max_open_per_uid": numbers // 2,
            "in_flight": max(nofile // 2 - 1, 8),
            "in_flight_per_uid": max(nofile // 4, 8),
            "in_flight_per_connection": max(min(nofile // 4, 1012), 8),
        }
        whole = {n: v if n.endswith("_timeout") else int(v) for n, v in changed.items()}
        return cls(**{**defaults, **whole})  # type: ignore[arg-type]


def refuse_too_large(changed: Mapping[str, float | int]) -> None:
    """Raises: InvalidArgument: a value of *changed* has more than 63 bits."""
    for name, value in changed.items():
        if isinstance(value, (int, float)) and _LARGEST < abs(value) != math.inf:
            raise InvalidArgument("limits", f"{name} is {value!r}, at most {_LARGEST}")
