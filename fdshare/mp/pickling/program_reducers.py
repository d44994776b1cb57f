"""Where a program says itself how its objects are pickled, that is obeyed.

It may say so for objects that have a kind: `ForkingPickler.register`, `copyreg.pickle` and, with
dill, `dill.pickle` for a class such as socket.socket; methods such as `__reduce__` in a class that
derives from one. The packages register reducers for the same classes: those give way to ours.
"""

from __future__ import annotations

import copyreg
from collections.abc import Callable, Mapping
from operator import itemgetter
from types import CodeType, FunctionType
from typing import Any, ClassVar, Final, Protocol, TypeAlias

from fdshare.kinds import base_with_kind

__all__ = [
    "Dispatched",
    "HasReducers",
    "Reducer",
    "Reducers",
    "differs",
    "is_dispatched",
    "is_programs",
    "leaves_built_in",
    "pickles_itself",
    "reducer_of_program",
]

Reducer: TypeAlias = Callable[[Any], tuple[Any, ...] | str]
Reducers: TypeAlias = dict[type, Reducer]
Dispatched: TypeAlias = Mapping[type, object]  # the `dispatch` of dill's pickler

# Their reducers of classes that have a kind, and those of exceptions.
_PACKAGES: Final = frozenset(
    {
        f"{package}.{name}"
        for package in ("multiprocessing", "multiprocess")
        for name in ("reduction", "connection")
    }
    | {"dill._dill", "pickle", "tblib.pickling_support"}
)
_METHODS: Final = ("__reduce_ex__", "__reduce__", "__getstate__")


class HasReducers(Protocol):
    """A pickler."""

    registered: ClassVar[Reducers]  # with ForkingPickler.register
    dispatched: ClassVar[Dispatched | None]


def reducer_of_program(pickler: HasReducers | type[HasReducers], cls: type) -> Reducer | None:
    """What the program has registered for objects of *cls*; None: nothing.

    The order is that of the standard pickler, and of dill's.
    """
    if is_dispatched(pickler.dispatched, cls):
        return _left_to_pickler
    reducer = pickler.registered.get(cls)
    if reducer is not None:
        return reducer if is_programs(reducer) else None
    reducer = copyreg.dispatch_table.get(cls)
    return reducer if is_programs(reducer) else None


def is_programs(reducer: object) -> bool:
    """True if none of the packages has registered *reducer*."""
    return getattr(reducer, "__module__", None) not in _PACKAGES  # any callable may be one


def is_dispatched(dispatched: Dispatched | None, cls: type) -> bool:
    """True if the program has registered something for *cls* in *dispatched*."""
    return dispatched is not None and cls in dispatched and is_programs(dispatched[cls])


# Types that pickle's picklers know themselves: a program can change that in dill's table alone.
_of_built_in: Final = itemgetter(
    *(int, float, bool, str, bytes, bytearray, type(None), tuple, list, dict, set, frozenset),
    *(type, FunctionType, CodeType),
)
_seen: tuple[object, ...] = ()  # entries of dill's table for them, none of which is the program's


def leaves_built_in(dispatched: Dispatched | None) -> bool:
    """True if the program has registered nothing in *dispatched* for numbers, text, containers,
    classes, functions and their code."""
    global _seen
    if dispatched is None:
        return True
    try:
        entries = _of_built_in(dispatched)
    except KeyError:  # it has taken one out
        return False
    if entries != _seen:
        if any(map(is_programs, entries)):
            return False
        _seen = entries
    return True


def _left_to_pickler(_: object) -> Any:
    return NotImplemented


def pickles_itself(cls: type) -> bool:
    """True if *cls* has methods for pickling that are not those of its base class with a kind."""
    base = base_with_kind(cls)
    return base is not None and differs(cls, base)


def differs(cls: type, base: type) -> bool:
    """True if *cls* has methods for pickling that are not those of its *base*."""
    return any(getattr(cls, name) is not getattr(base, name) for name in _METHODS)
