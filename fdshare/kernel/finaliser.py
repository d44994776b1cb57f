"""finaliser: a `__del__` that says nothing at the end of the interpreter.

A module may have lost its names by then: what it imported is None. The kernel closes what is left.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TypeVar

__all__ = ["finaliser"]

T = TypeVar("T")


def finaliser(close: Callable[[T], None]) -> Callable[[T], None]:
    """*close* as a `__del__`: what it raises at the end of the interpreter goes nowhere."""
    is_finalizing = sys.is_finalizing  # of the closure, which keeps its names

    def __del__(self: T) -> None:
        try:
            close(self)
        except Exception:
            if not is_finalizing():
                raise

    return __del__
