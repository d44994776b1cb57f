"""Pickles of what needs no reducer of ours, made almost without a call in Python: in a third of the
time that the pickler of reducers.py takes, and in a tenth to a hundredth of what dill's takes.

That is numbers, text, containers, names, and numpy's arrays and numbers. The C pickler asks its
table about each type that it does not know itself. The first one that may need more ends the
attempt. Where the package pickles with dill, a function or a class is plain if dill would write
its name, too, and not what it is made of.
"""

from __future__ import annotations

import copyreg
import io
import pickle
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from operator import methodcaller
from pickle import PickleBuffer
from types import (
    BuiltinFunctionType,
    FunctionType,
    MethodDescriptorType,
    MethodType,
    ModuleType,
    WrapperDescriptorType,
)
from typing import Any, Final

from fdshare.kinds import in_shared_memory, is_shareable, user_kinds
from fdshare.mp.pickling.array_pickles import NUMBERS, Key, key_of, room_in
from fdshare.mp.pickling.bundle import Bundle, Inline, Reduced, pickle_of_large, with_memory
from fdshare.mp.pickling.by_value import ByValue
from fdshare.mp.pickling.large import BALLAST, LARGE, NEW, take_large
from fdshare.mp.pickling.memfd_cache import MemfdCache, new_copy_of
from fdshare.mp.pickling.program_reducers import (
    Dispatched,
    Reducer,
    Reducers,
    is_dispatched,
    is_programs,
    leaves_built_in,
)

__all__ = ["BESIDE", "PROTOCOL", "PlainPickler", "dump_plain", "dump_text", "make_plain_pickler"]

PROTOCOL: Final = 5  # has buffers beside the pickle


class PlainPickler(pickle.Pickler):
    """A pickler that raises where an object may need a reducer, of ours or of the program."""

    dispatch_table: _PlainTypes
    of_large: type[PlainPickler]  # takes large arrays, too
    # Of an array: what is before its numbers in a pickle, and behind them; of a large one the
    # pickle that is sent with memory, too, and the one in that.
    arrays: dict[Key | None, tuple[bytes, ...]]
    skips = 15  # so many objects are not tried after one that was refused


class _PlainBesideDill(PlainPickler):
    """The same, where dill would pickle."""

    skips = 0  # dill takes many times what a failed attempt does
    by_value: ByValue

    def reducer_override(self, obj: Any) -> Any:
        """NotImplemented: *obj* is pickled as without this method."""
        cls = type(obj)
        if cls is FunctionType:
            if _home(obj) in (None, "__main__"):
                reduced = self.by_value.reduce(obj)
                if reduced is None:
                    raise _Refused
                return reduced
        elif cls is type and _home(obj) not in _OF_CLASSES:
            raise _Refused
        return NotImplemented


# Modules whose classes dill pickles by their names. Of others it does not always do so.
_OF_CLASSES: Final = frozenset({"builtins", "numpy"})


def _home(obj: Any) -> str | None:
    """The name of the module in which a function or class is found by its own name."""
    name = obj.__module__
    if type(name) is not str:
        return None
    module = sys.modules.get(name)
    found = type(module) is ModuleType and vars(module).get(obj.__qualname__) is obj
    return name if found else None


class _Refused(Exception):
    """An object may have something for a reducer in it."""


class _IsLarge(Exception):
    """There is an array that is to be taken out of the pickle."""


class _PlainTypes(dict[type, Reducer]):
    """A dispatch table for types whose objects need none: they are pickled as without a table. Any
    other type is refused."""

    def __init__(
        self, registered: Reducers, dispatched: Dispatched | None, reduce_array: Reducer
    ) -> None:
        self._registered = registered
        self.dispatched = dispatched
        self._reduce_array = reduce_array

    def __missing__(self, cls: type) -> Reducer:
        numpy: Any = sys.modules.get("numpy")
        has_numpy = hasattr(numpy, "ndarray")
        if cls in copyreg.dispatch_table:
            if has_numpy and cls is type(numpy.dtype):  # numpy has registered it
                return copyreg.dispatch_table[cls]
            raise _Refused
        if (user_kinds and is_shareable(cls)) or is_dispatched(self.dispatched, cls):
            raise _Refused
        registered = self._registered.get(cls)
        if registered is not None:
            if cls not in _CALLABLES or is_programs(registered):
                raise _Refused
            self[cls] = registered
        elif has_numpy and cls is numpy.ndarray:
            self[cls] = self._reduce_array
        elif has_numpy and issubclass(cls, numpy.dtype):
            self[cls] = _reduce_type
        elif cls is BuiltinFunctionType or (has_numpy and _is_number(cls, numpy)):
            self[cls] = _reduce
        else:
            raise _Refused
        return self[cls]

    def update_types(self) -> None:
        """Forgets the types for which the program has registered something since."""
        registered, dispatched = self._registered, self.dispatched
        for cls, reducer in self.items():
            if (
                user_kinds
                or registered.get(cls, reducer) is not reducer
                or cls in copyreg.dispatch_table
                or (dispatched is not None and is_dispatched(dispatched, cls))
            ):
                self.clear()
                break


def _is_number(cls: type, numpy: Any) -> bool:
    """True if *cls* is a type of numpy's for a number, or for the types of an array's numbers."""
    return issubclass(cls, numpy.dtype) or (
        issubclass(cls, numpy.generic) and cls.__module__ == "numpy"
    )


# Both packages register reducers for them.
_CALLABLES: Final = frozenset({partial, MethodType, MethodDescriptorType, WrapperDescriptorType})
_reduce: Final = methodcaller("__reduce_ex__", PROTOCOL)


# What numpy reduces an array to, besides its numbers, their type, and its shape: by the letter of
# the type. To look it up takes a fifth of the time that numpy takes to say it.
_of_arrays: Final[dict[str, tuple[Any, tuple[Any, ...]]]] = {}
# By its id, a type of numbers of which there is one, and what it is reduced to.
_of_types: Final[dict[int, tuple[Any, Reduced]]] = {}


def _reduce_array(array: Any) -> Reduced:
    if in_shared_memory(array):
        raise _Refused
    dtype = array.dtype
    known = _of_arrays.get(dtype.char)
    if known is not None and array.flags.c_contiguous:
        build, others = known
        return build, (PickleBuffer(array), dtype, array.shape, *others)
    reduced: Reduced = _reduce(array)
    if known is None and dtype.char in NUMBERS and array.flags.c_contiguous:
        build, (buffer, *rest) = reduced[:2]
        # As long as numpy says it in this form.
        if type(buffer) is PickleBuffer and rest[:2] == [dtype, array.shape]:
            _of_arrays[dtype.char] = build, tuple(rest[2:])
    return reduced


def _reduce_type(dtype: Any) -> Reduced:
    known = _of_types.get(id(dtype))
    if known is not None:
        return known[1]
    reduced: Reduced = _reduce(dtype)
    if dtype.char in NUMBERS and sys.modules["numpy"].dtype(dtype.char) is dtype:
        _of_types[id(dtype)] = dtype, reduced
    return reduced


def _reduce_smaller_array(array: Any) -> Reduced:
    if array.nbytes >= LARGE:
        raise _IsLarge
    return _reduce_array(array)


def make_plain_pickler(
    registered: Reducers, dispatched: Dispatched | None = None, by_value: ByValue | None = None
) -> type[PlainPickler]:
    """The PlainPickler of a program that registers reducers in *registered*, with copyreg, and in
    *dispatched*, the table of dill's pickler. That and *by_value* are None where the package
    pickles without dill."""
    base = PlainPickler if by_value is None else _PlainBesideDill
    ways = _reduce_array, _reduce_smaller_array
    tables = [_PlainTypes(registered, dispatched, how) for how in ways]
    attributes: dict[str, object] = {"by_value": by_value, "dispatch_table": tables[0]}
    of_large = type("PlainPickler", (base,), attributes)
    attributes |= {"dispatch_table": tables[1], "of_large": of_large, "arrays": {}}
    return type("PlainPickler", (base,), attributes)


class _Parts:
    """A file that has what is written to it as it is: the C pickler writes large bytes so."""

    __slots__ = ("write",)

    def __init__(self, write: Callable[[Any], None]) -> None:
        self.write = write


# Bytes from which on the C pickler writes a buffer beside its frames, as it is.
BESIDE: Final = 1 << 16
_skipped = 0  # how many objects are not tried, after one that was refused


def dump_plain(
    plain: type[PlainPickler], obj: Any, cache: MemfdCache | None
) -> bytes | Bundle | None:
    """*obj* pickled; *cache* is that of `encode`. None: it is, or may be, more than *plain* can
    pickle."""
    global _skipped
    if _skipped and plain.skips:
        _skipped -= 1
        return None
    types = plain.dispatch_table
    if not leaves_built_in(types.dispatched):
        return None
    if types:
        types.update_types()
        if _is_array(types, obj) and obj.nbytes >= BESIDE and not in_shared_memory(obj):
            if obj.nbytes < LARGE:
                known = plain.arrays.get(key_of(obj))
                if known is not None and type(obj.dtype) in types:
                    return b"".join((known[0], PickleBuffer(obj).raw(), known[1]))
            elif cache is not None:
                return _dump_large_array(plain, obj, cache)
    parts: list[Any] = []
    try:
        plain(_Parts(parts.append), PROTOCOL).dump(obj)
    except _IsLarge:
        return _dump_large(plain.of_large, obj, cache)
    except _Refused:
        _skipped = plain.skips
        return None
    if len(parts) == 1:
        return parts[0]  # type: ignore[no-any-return]
    if _is_array(types, obj):
        _remember(plain, obj, parts)
    return _joined(parts, (), cache) or _joined([_in_one(plain, obj)], (), cache)


def dump_text(text: bytes | str, cache: MemfdCache) -> bytes | Bundle:
    """As `dump_plain`, of a large *text*."""
    parts: list[Any] = []
    pickle.Pickler(_Parts(parts.append), PROTOCOL).dump(text)
    return _joined(parts, (), cache) or b"".join(parts)


def _is_array(types: _PlainTypes, obj: Any) -> bool:
    """True if *obj* is an array of numpy, some of which was pickled before."""
    return types.get(type(obj)) is _reduce_smaller_array


def _remember(
    plain: type[PlainPickler], array: Any, parts: list[Any], inner: bytes | None = None
) -> None:
    """Remembers what is around the numbers of *array* in a pickle of these *parts*; *inner*: of a
    large array, the one beside its numbers."""
    key = key_of(array)
    if key is None or len(parts) != 3 or type(parts[1]) is not PickleBuffer:
        return
    if (array.nbytes >= LARGE) == (inner is not None) and room_in(plain.arrays):
        around = parts[0], parts[2]
        if inner is None:
            plain.arrays[key] = around
        else:
            plain.arrays[key] = *around, pickle_of_large(0, (array.nbytes,), inner), inner


def _dump_large_array(
    plain: type[PlainPickler], array: Any, cache: MemfdCache
) -> bytes | Bundle | None:
    """As `dump_plain`, of a large *array*."""
    types, cls = plain.dispatch_table, type(array.dtype)
    known = plain.arrays.get(key_of(array))
    if known is None or cls not in types:
        message = _dump_large(plain.of_large, array, cache)
        if type(message) is Bundle:
            with suppress(_Refused):  # by another thread
                types[cls]  # it is plain, too
            if known is None:
                _remember_large(plain, array)
        return message
    head, tail, outer, inner = known
    view = PickleBuffer(array).raw()
    pieces, size = ((0, view),), view.nbytes
    memory = cache.copy_of(pieces, size)
    if memory is None and size >= NEW:
        memory, outer = new_copy_of(pieces), pickle_of_large(0, (size,), inner, BALLAST)
    if memory is None:
        return b"".join((head, view, tail))
    return Bundle(outer, [memory.fileno()], memory=memory)


def _remember_large(plain: type[PlainPickler], array: Any) -> None:
    """Remembers the pickles of a large *array*."""
    parts: list[Any] = []
    plain.of_large(_Parts(parts.append), PROTOCOL).dump(array)
    buffer = io.BytesIO()
    plain.of_large(buffer, PROTOCOL, buffer_callback=partial(take_large, [])).dump(array)
    _remember(plain, array, parts, buffer.getvalue())


def _dump_large(
    plain: type[PlainPickler], obj: Any, cache: MemfdCache | None
) -> bytes | Bundle | None:
    """As `dump_plain`, of what has large arrays in it."""
    plain.dispatch_table.update_types()
    large: list[memoryview] = []
    parts: list[Any] = []
    taking = None if cache is None else partial(take_large, large)
    try:
        plain(_Parts(parts.append), PROTOCOL, buffer_callback=taking).dump(obj)
    except _Refused:
        return None
    return _joined(parts, large, cache) or _joined([_in_one(plain, obj)], (), cache)


def _joined(
    parts: list[Any], large: Sequence[memoryview], cache: MemfdCache | None
) -> bytes | Bundle | None:
    """The pickle that has these *parts*, and the *large* buffers beside it. None: it has to be made
    again, as a whole."""
    if bytearray in map(type, parts):  # another thread may change it
        return None
    pickled = [part if type(part) is bytes else part.raw() for part in parts]
    if cache is not None and (large or sum(map(len, pickled)) >= LARGE):
        bundle = with_memory(pickled, large, Inline(), None, cache)
        if bundle is not None or large:
            return bundle
    return b"".join(pickled)


def _in_one(plain: type[PlainPickler], obj: Any) -> bytes:
    buffer = io.BytesIO()
    plain(buffer, PROTOCOL).dump(obj)
    return buffer.getvalue()
