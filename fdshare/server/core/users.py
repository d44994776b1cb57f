"""User: what the connections of one uid take of the server, beside its entries.

Whatever users share is counted against each of them, so that nobody can use it up.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

__all__ = ["User", "allowance"]


@dataclass(slots=True, eq=False)
class User:
    """One uid with connections. *trusted*: no limit for each uid binds it (see policy.py)."""

    uid: int
    trusted: bool
    connections: int = 0
    in_flight: int = 0  # descriptors sent and not yet read
    received: int = 0  # descriptors that came, and are in no entry
    time: float = 0.0  # processor seconds that the loop has worked for it: see run_queue.py
    watches: int = 0
    patterns: Counter[str] = field(default_factory=Counter)  # those of its watches with wildcards
    buffered: int = 0  # bytes of half requests, of those that wait, and of answers not read


def allowance(share: int, limit: int, others: int) -> int:
    """How much of *limit* one uid may have, at most *share*, where *others* have the rest of what
    is used.

    Never more than half of what others leave (or the same part of it that *share* is of *limit*):
    users that take all they can, however many they are, leave something for the next one.
    """
    return min(share, max(int((limit - others) * max(share / limit, 0.5)), 1))
