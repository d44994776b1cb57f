"""Labels: the names under which a service manager holds the descriptors of a table.

    .k3F0  .k3F1  .k3F2 ...     a table's own three characters, and a number of base 62

systemd passes them back in one variable of the environment, LISTEN_FDNAMES, and execve(2) takes at
most MAX_ARG_STRLEN bytes of it: with longer ones the next start fails. So they are short, and a
number is used again. A table has characters of its own so that what is left of another table is
never taken for its own.
"""

from __future__ import annotations

import heapq
import os
import re
import secrets
import string
from collections.abc import Iterable
from typing import Final

__all__ = ["BUDGET", "MOST", "PAGE", "TABLE", "Labels", "is_label", "new_prefix", "price"]

TABLE: Final = "fdshare-table"  # the memfd's
PAGE: Final = "fdshare-page"  # that of loop/page.py
_DIGITS: Final = string.digits + string.ascii_letters
_PREFIX: Final = 3  # characters
_LABEL: Final = re.compile(r"\.[0-9A-Za-z]{4,}")
# Bytes of LISTEN_FDNAMES that are for labels: MAX_ARG_STRLEN (<linux/binfmts.h>) without the name
# of the variable, our own two and the end, and without the names that a socket unit gives.
_OTHERS: Final = 1024
_OURS: Final = len(f"LISTEN_FDNAMES={TABLE}:{PAGE}:\0")
BUDGET: Final = 32 * os.sysconf("SC_PAGESIZE") - _OURS - _OTHERS


def is_label(name: str) -> bool:
    """Whether *name* is the label of some table."""
    return _LABEL.fullmatch(name) is not None


def new_prefix() -> str:
    """The characters of another table."""
    return "." + "".join(secrets.choice(_DIGITS) for _ in range(_PREFIX))


def price(label: str) -> int:
    """How many bytes of the budget it takes."""
    return len(label) + len(":")


def _most() -> int:
    """How many labels fit into the budget, the shortest first."""
    most, left, digits = 0, BUDGET, 0
    while left > 0:
        digits += 1
        each = price("." + "x" * (_PREFIX + digits))
        numbers = len(_DIGITS) ** digits - (len(_DIGITS) ** (digits - 1) if digits > 1 else 0)
        most += min(numbers, left // each)
        left -= numbers * each
    return most


MOST: Final = _most()


class Labels:
    """Those of one table: which are free, the shortest first."""

    def __init__(self, prefix: str, used: Iterable[str] = ()) -> None:
        self._prefix = prefix
        numbers = {_number(label[len(prefix) :]) for label in used}
        self._next = max(numbers, default=-1) + 1
        self._free = sorted(set(range(self._next)) - numbers)

    def take(self) -> str:
        """One that is free."""
        if self._free:
            return self._prefix + _text(heapq.heappop(self._free))
        self._next += 1
        return self._prefix + _text(self._next - 1)

    def give_back(self, label: str) -> None:
        """It is free again."""
        heapq.heappush(self._free, _number(label[len(self._prefix) :]))


def _text(number: int) -> str:
    text = ""
    while True:
        number, digit = divmod(number, len(_DIGITS))
        text = _DIGITS[digit] + text
        if not number:
            return text


def _number(text: str) -> int:
    number = 0
    for digit in text:
        number = number * len(_DIGITS) + _DIGITS.index(digit)
    return number
