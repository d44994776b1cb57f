"""Functions that dill pickles by value: the pickle of one is kept, and used again as long as dill
would write the same.

Those are lambdas, functions in functions, and all of `__main__`, such as a notebook's. dill takes a
hundred microseconds for each, and many are submitted again and again. What it writes depends on the
code and the attributes of the function. Of its globals it writes the name of their module.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from operator import is_
from types import CodeType, FunctionType
from typing import Any, Final

from fdshare.mp.pickling.bundle import Reduced

__all__ = ["ByValue"]

_MOST: Final = 64  # pickles that are kept
_CONSTANT: Final = frozenset({int, float, complex, bool, str, bytes, type(None), type(...)})
# Py_TPFLAGS_IMMUTABLETYPE of CPython's object.h: int has it, and no class that Python code makes.
_IMMUTABLE: Final = 1 << 8


class ByValue:
    """The reduce values of functions that *dump* pickles by value, for *loads* of dill to load.
    *settings* are dill's."""

    def __init__(
        self,
        dump: Callable[[FunctionType], object],
        loads: Callable[..., Any],
        settings: Mapping[str, object],
    ) -> None:
        self._dump = dump
        self._loads = loads
        self._settings = settings
        self._kept: dict[int, tuple[tuple[Any, ...], object]] = {}  # parts, and their pickle

    def reduce(self, function: FunctionType) -> Reduced | None:
        """The reduce value of *function*; None: it is to be pickled each time.

        Raises: whatever pickling raises.
        """
        if self._settings["recurse"]:  # the globals, too
            return None
        parts = _parts(function)
        if parts is None:
            return None
        kept = self._kept.get(id(function.__code__))
        if kept is None or not _are_same(kept[0], parts):
            if not _are_constant(parts):
                return None
            kept = parts, self._dump(function)
            if len(self._kept) >= _MOST:
                self._kept.clear()
            self._kept[id(function.__code__)] = kept
        return self._loads, (kept[1],)


def _parts(function: FunctionType) -> tuple[Any, ...] | None:
    """What dill writes of *function*; None: more than that."""
    if function.__closure__ or function.__kwdefaults__ or function.__dict__:
        return None
    name, scope = function.__module__, function.__globals__
    module = sys.modules.get(name) if type(name) is str else None
    if getattr(module, "__dict__", None) is not scope or scope.get("__name__") != name:
        return None
    annotations = function.__annotations__
    return (
        *(function.__code__, function.__defaults__, function.__doc__, name),
        *(function.__name__, function.__qualname__, *annotations, *annotations.values()),
    )


def _are_same(before: tuple[Any, ...], now: tuple[Any, ...]) -> bool:
    return len(before) == len(now) and all(map(is_, before, now))


def _are_constant(parts: Iterable[Any]) -> bool:
    """True if no part can change."""
    for part in parts:
        cls = type(part)
        if cls is CodeType:
            part = part.co_consts
        elif cls is not tuple and cls is not frozenset:
            if cls in _CONSTANT or (cls is type and part.__flags__ & _IMMUTABLE):
                continue
            return False
        if not _are_constant(part):
            return False
    return True
