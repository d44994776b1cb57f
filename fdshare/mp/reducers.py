"""What a pickler of ours does with an object that has a descriptor: it asks the transit.

One `reducer_override` serves both families. It is asked before dill's own file handlers (which
reopen by *name*) and before multiprocessing's (which start a server thread and a connection for
each descriptor); `copyreg`, `register()` and `dispatch_table` would be asked after dill's. The
standard pickler calls it for everything but numbers, strings and containers, dill's for those too,
so it looks at the type first (multiprocessing/reduction.py, dill/_dill.py 0.4.1: `_Pickler.save`).

Exceptions carry their traceback along, by way of tblib.
"""

from __future__ import annotations

import io
import pickle
from types import BuiltinFunctionType, FunctionType, TracebackType
from typing import Any, Final

from tblib.pickling_support import pickle_exception, pickle_traceback

from fdshare.kinds import describe, describers, in_shared_memory, is_shareable, user_kinds
from fdshare.mp.transit import Bundle, Inline, Transit

__all__ = ["PLAIN", "dumps", "make_pickler", "reduce_with"]

# Types that never hold a descriptor themselves; for dill's pickler, which asks about each of them.
PLAIN: Final = frozenset(
    {int, str, bytes, float, bool, complex, type(None), tuple, list, dict, set, frozenset}
    | {type, FunctionType, BuiltinFunctionType, bytearray}
)
_NUMBERS_AND_TEXT: Final = frozenset({int, str, bytes, float, bool, type(None)})

_plain_dumps: Final = pickle.dumps


def make_pickler(forking_pickler: Any) -> Any:
    """A subclass of a family's ForkingPickler; its instances have a `transit`."""

    def reducer_override(self: Any, obj: Any) -> Any:
        cls = type(obj)
        return NotImplemented if cls in PLAIN else reduce_with(self.transit, self, obj, cls)

    namespace = {"transit": None, "bare_exceptions": False, "saw_exception": False}
    return type("Pickler", (forking_pickler,), namespace | {"reducer_override": reducer_override})


def dumps(family: Any, obj: Any) -> Bundle:
    """*obj* pickled, and its descriptors, borrowed from it.

    Raises: whatever pickling raises; nothing was duplicated then.
    """
    if type(obj) in _NUMBERS_AND_TEXT:
        return Bundle(_plain_dumps(obj, -1))
    return _dump(family, obj, False)


def _dump(family: Any, obj: Any, bare_exceptions: bool) -> Bundle:
    buffer = io.BytesIO()
    pickler = family.Pickler(buffer, None)
    pickler.transit = transit = Inline()
    if bare_exceptions:
        pickler.bare_exceptions = True
    try:
        pickler.dump(obj)
    except Exception:
        # What made an exception unpicklable may be its context or cause, which pickle leaves out.
        if pickler.saw_exception and not bare_exceptions:
            return _dump(family, obj, True)
        raise
    return Bundle(buffer.getbuffer(), transit.fds, transit.holders)


def reduce_with(transit: Transit, pickler: Any, obj: Any, cls: type) -> Any:
    """The reduce value of *obj*, of type *cls*; NotImplemented where *pickler* knows better.

    Raises: what `kinds.describe` raises.
    """
    if cls in describers:
        return transit.carry(obj, *describe(obj))
    if issubclass(cls, BaseException):
        return _reduce_exception(pickler, obj)
    if cls is TracebackType:
        return NotImplemented if pickler.bare_exceptions else pickle_traceback(obj)
    if hasattr(cls, "fileno"):
        return _reduce_with_fileno(transit, pickler, obj, cls)
    if hasattr(cls, "__array_interface__") and in_shared_memory(obj):
        return transit.carry(obj, *describe(obj))
    if cls.__module__ == "tempfile" or user_kinds:
        return transit.carry(obj, *describe(obj)) if is_shareable(cls) else NotImplemented
    return NotImplemented


def _reduce_with_fileno(transit: Transit, pickler: Any, obj: Any, cls: type) -> Any:
    if is_shareable(cls):
        return transit.carry(obj, *describe(obj))
    if cls in pickler.dispatch_table or cls in getattr(pickler, "dispatch", ()):
        return NotImplemented
    # A class of a program that has a fileno() method is pickled as the program wants. What cannot
    # be pickled at all (select.epoll) is carried as what it is: a descriptor.
    try:
        return obj.__reduce_ex__(pickle.DEFAULT_PROTOCOL)
    except TypeError:
        return transit.carry(obj, *describe(obj))


def _reduce_exception(pickler: Any, error: BaseException) -> Any:
    if pickler.bare_exceptions:
        return NotImplemented
    pickler.saw_exception = True
    return pickle_exception(error)
