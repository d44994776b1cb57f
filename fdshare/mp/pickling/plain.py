"""Pickles of what needs no reducer of ours, made almost without a call in Python: in a third of the
time that the pickler of reducers.py takes.

That is numbers, text, containers, names, and numpy's arrays and numbers. The C pickler asks its
table about each type that it does not know itself. The first one that may need more ends the
attempt.
"""

from __future__ import annotations

import copyreg
import io
import pickle
import sys
from operator import methodcaller
from types import BuiltinFunctionType
from typing import Any, Final

from fdshare.kinds import in_shared_memory, is_shareable, user_kinds
from fdshare.mp.pickling.bundle import Reduced
from fdshare.mp.pickling.large import LARGE
from fdshare.mp.pickling.program_reducers import Reducer, Reducers

__all__ = ["PROTOCOL", "PlainPickler", "dump_plain", "make_plain_pickler"]

PROTOCOL: Final = 5  # has buffers beside the pickle


class PlainPickler(pickle.Pickler):
    """A pickler that raises where an object may need a reducer, of ours or of the program."""

    dispatch_table: _PlainTypes


class _Refused(Exception):
    """An object may have something for a reducer in it."""


class _PlainTypes(dict[type, Reducer]):
    """A dispatch table for types whose objects need none: they are pickled as without a table. Any
    other type is refused."""

    def __init__(self, registered: Reducers) -> None:
        self._registered = registered

    def __missing__(self, cls: type) -> Reducer:
        numpy: Any = sys.modules.get("numpy")
        has_numpy = hasattr(numpy, "ndarray")
        if cls in copyreg.dispatch_table:
            if has_numpy and cls is type(numpy.dtype):  # numpy has registered it
                return copyreg.dispatch_table[cls]
            raise _Refused
        if cls in self._registered or (user_kinds and is_shareable(cls)):
            raise _Refused
        if has_numpy and cls is numpy.ndarray:
            self[cls] = _reduce_array
        elif cls is BuiltinFunctionType or (has_numpy and _is_number(cls, numpy)):
            self[cls] = _reduce
        else:
            raise _Refused
        return self[cls]

    def update_types(self) -> None:
        """Forgets the types for which the program has registered something since."""
        if user_kinds or not (
            self._registered.keys().isdisjoint(self)
            and copyreg.dispatch_table.keys().isdisjoint(self)
        ):
            self.clear()


def _is_number(cls: type, numpy: Any) -> bool:
    """True if *cls* is a type of numpy's for a number, or for the types of an array's numbers."""
    return issubclass(cls, numpy.dtype) or (
        issubclass(cls, numpy.generic) and cls.__module__ == "numpy"
    )


_reduce: Final = methodcaller("__reduce_ex__", PROTOCOL)


def _reduce_array(array: Any) -> Reduced:
    if array.nbytes >= LARGE or in_shared_memory(array):
        raise _Refused
    reduced: Reduced = _reduce(array)
    return reduced


def make_plain_pickler(registered: Reducers) -> type[PlainPickler]:
    """The PlainPickler of a program that registers reducers in *registered*, and with copyreg."""
    return type("PlainPickler", (PlainPickler,), {"dispatch_table": _PlainTypes(registered)})


_skipped = 0  # how many objects are not tried, after one that was refused


def dump_plain(plain: type[PlainPickler], obj: Any) -> bytes | None:
    """None: *obj* is, or may be, more than *plain* can pickle."""
    global _skipped
    if _skipped:
        _skipped -= 1
        return None
    if plain.dispatch_table:
        plain.dispatch_table.update_types()
    buffer = io.BytesIO()
    try:
        plain(buffer, PROTOCOL).dump(obj)
    except _Refused:
        _skipped = 15
        return None
    return buffer.getvalue()
