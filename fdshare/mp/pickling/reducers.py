"""What our picklers do with an object that has a descriptor: the transit reduces it.

One `reducer_override` serves both families. It is asked before dill's own file handlers (which
reopen by *name*) and before multiprocessing's (which start a server thread and a connection for
each descriptor); `copyreg`, `register()` and `dispatch_table` would be asked after dill's. The
standard pickler calls it for everything but numbers, strings and containers, dill's for those too,
so it looks at the type first (multiprocessing/reduction.py, dill/_dill.py 0.4.1: `_Pickler.save`).

Exceptions are exceptions.py's.
"""

from __future__ import annotations

import copyreg
import io
import pickle
import selectors
from functools import partial
from pickle import PickleBuffer
from types import BuiltinFunctionType, CodeType, FunctionType, TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Final, Protocol, TypeAlias

from fdshare.kinds import Kind, describe, describers, in_shared_memory, is_shareable, user_kinds
from fdshare.mp.pickling.arrays import is_array, reduce_array
from fdshare.mp.pickling.bundle import (
    Bundle,
    Encoded,
    Inline,
    Transit,
    as_bundle,
    bare_pickle,
    with_memory,
)
from fdshare.mp.pickling.by_value import ByValue
from fdshare.mp.pickling.dill_code import check_code
from fdshare.mp.pickling.exceptions import Links, reduce_exception, reduce_links
from fdshare.mp.pickling.large import LARGE, take_large
from fdshare.mp.pickling.memfd_cache import MemfdCache
from fdshare.mp.pickling.plain import (
    PROTOCOL,
    PlainPickler,
    dump_plain,
    dump_text,
    make_plain_pickler,
)
from fdshare.mp.pickling.program_reducers import (
    Dispatched,
    HasReducers,
    Reducers,
    differs,
    is_dispatched,
    pickles_itself,
    reducer_of_program,
)
from fdshare.mp.pickling.tracebacks import reduce_traceback

if TYPE_CHECKING:
    from pickle import Pickler as _Pickler

    from fdshare.mp.stock import StockForkingPickler
else:
    _Pickler = object

__all__ = [
    "PLAIN",
    "HasPickler",
    "Override",
    "TransitPickler",
    "dumps",
    "encode",
    "make_pickler",
    "reduce_with",
]

# What a reducer_override returns: a reduce value, or NotImplemented, which is Any to a checker.
Override: TypeAlias = Any

# Types that never hold a descriptor themselves; for dill's pickler, which asks about each of them.
PLAIN: Final = frozenset(
    {int, str, bytes, float, bool, complex, type(None), tuple, list, dict, set, frozenset}
    | {type, FunctionType, BuiltinFunctionType, bytearray}
)
_NUMBERS_AND_TEXT: Final = frozenset({int, str, bytes, float, bool, type(None)})

_plain_dumps: Final = pickle.dumps


class TransitPickler(_Pickler):
    """The pickler of our channels, before the class that pickles for one family."""

    transit: Inline
    plain: ClassVar[type[PlainPickler]]
    registered: ClassVar[Reducers]
    dispatched: ClassVar[Dispatched | None]
    bare_exceptions = False  # pickle them as the package does it

    # exceptions.py has what these are.
    met: set[int]
    unlinked: frozenset[int] = frozenset()
    parts: tuple[TransitPickler, ...] = ()

    def reducer_override(self, obj: Any) -> Override:
        cls = type(obj)
        if cls in PLAIN:
            return NotImplemented
        if cls is Bundle:
            return self.transit.carry_bundle(obj)
        if cls is PickleBuffer:  # the C pickler does not ask
            return _reduce_empty_buffer(obj)
        if issubclass(cls, BaseException) and cls not in describers:
            return NotImplemented if self.bare_exceptions else reduce_exception(self, obj)
        if cls is TracebackType and not self.bare_exceptions:
            return reduce_traceback(obj)
        if cls is Links:
            return reduce_links(self, obj)
        reducer = self.registered.get(cls)
        if reducer is not None and not is_shareable(cls):
            return reducer(obj)
        reduced = reduce_with(self.transit, self, obj, cls)
        if reduced is not NotImplemented or self.dispatched is None or not is_array(cls):
            return reduced
        # dill's own way of pickling it copies the numbers.
        own = reducer_of_program(self, cls) is None
        return obj.__reduce_ex__(PROTOCOL) if own else NotImplemented

    @staticmethod
    def loads(data: bytes | memoryview, /) -> Any:
        """The object of a pickle of this family's."""
        return pickle.loads(data)

    def part(self, obj: object, unlinked: frozenset[int]) -> bytes:
        """A pickle of *obj* inside this one, with its descriptors beside those of this one.

        Raises: whatever pickling raises; this pickle is as it was.
        """
        buffer = io.BytesIO()
        self._dump_part(buffer, obj, unlinked)
        return buffer.getvalue()

    def small_part(self, obj: object, unlinked: frozenset[int]) -> bytes | None:
        """The same; None: it cannot be pickled, is longer than SMALL, or has descriptors."""
        buffer, first = _SmallBuffer(), len(self.transit.fds)
        try:
            self._dump_part(buffer, obj, unlinked)
        except Exception:
            return None
        if len(self.transit.fds) > first:
            del self.transit.fds[first:]
            return None
        return buffer.getvalue()

    def _dump_part(self, buffer: io.BytesIO, obj: object, unlinked: frozenset[int]) -> None:
        inner = type(self)(buffer, PROTOCOL)
        inner.transit, inner.met, inner.unlinked = self.transit, set(), unlinked
        first = len(self.transit.fds)
        try:
            inner.dump(obj)
        except BaseException:
            del self.transit.fds[first:]
            raise
        # Its memo keeps alive what has descriptors.
        self.parts += (inner,)


def _reduce_empty_buffer(buffer: PickleBuffer) -> Override:
    """The reduce value of *buffer* if nothing is in it.

    The pickler in Python pickles it as `b""`, which is one object for all, and fails where that is
    in its memo (`save_picklebuffer` in pickle.py, until 3.14). So it is with two empty arrays.
    """
    with memoryview(buffer) as view:
        if view.nbytes:
            return NotImplemented
        return (bytes if view.readonly else bytearray), ()


SMALL: Final = 1 << 16  # bytes


class _SmallBuffer(io.BytesIO):
    def write(self, data: Any) -> int:
        if self.tell() + len(data) > SMALL:
            raise OverflowError
        return super().write(data)


def make_pickler(forking_pickler: type[StockForkingPickler]) -> type[TransitPickler]:
    """The TransitPickler for the family of *forking_pickler*.

    On the standard family it is a pickle.Pickler that asks for the reducers registered with
    *forking_pickler* when it meets a type: ForkingPickler copies the table of them for each pickle.
    """
    is_dill = not issubclass(forking_pickler, pickle.Pickler)
    base = forking_pickler if is_dill else pickle.Pickler
    registered = forking_pickler._extra_reducers
    dispatched = getattr(forking_pickler, "dispatch", None)
    settings = getattr(forking_pickler, "settings", None)  # dill's
    attributes = {
        "registered": registered,
        "dispatched": dispatched,
        "loads": staticmethod(forking_pickler.loads),
    }
    made: type[TransitPickler] = type("Pickler", (TransitPickler, base), attributes)
    by_value = None
    if settings is not None:
        by_value = ByValue(partial(_dump, made, cache=None), forking_pickler.loads, settings)
    made.plain = make_plain_pickler(registered, dispatched, by_value)
    return made


class HasPickler(Protocol):
    """A family, as far as pickling goes."""

    @property
    def Pickler(self) -> type[TransitPickler]: ...


def encode(family: HasPickler, obj: Any, cache: MemfdCache | None = None) -> Encoded:
    """*obj* pickled. Its descriptors are borrowed from *obj*. What is large lies in memory of
    *cache* (large.py); None: its receiver may be the package itself, which takes all of it from the
    socket.

    Raises: whatever pickling raises; nothing was duplicated then.
    """
    cls = type(obj)
    if cls in _NUMBERS_AND_TEXT and not is_dispatched(family.Pickler.dispatched, cls):
        if (cls is bytes or cls is str) and len(obj) >= LARGE and cache is not None:
            return dump_text(obj, cache)
        return _plain_dumps(obj, -1)
    describe_it = describers.get(cls)
    if describe_it is not None and reducer_of_program(family.Pickler, cls) is None:
        kind, fds = describe_it(obj)
        known = _bare_pickles.get(id(kind))
        if known is None or known[0] is not kind:
            known = _bare_pickle(kind)
        if known is not None:
            return known[1], fds
    else:
        data = dump_plain(family.Pickler.plain, obj, cache)
        if data is not None:
            return data
    return _dump(family.Pickler, obj, cache)


def dumps(family: HasPickler, obj: Any) -> Bundle:
    """As `encode`, a Bundle in any case."""
    return as_bundle(encode(family, obj), obj)


def _dump(
    cls: type[TransitPickler], obj: Any, cache: MemfdCache | None, bare_exceptions: bool = False
) -> bytes | Bundle:
    buffer = io.BytesIO()
    large: list[memoryview] = []
    if cache is not None:
        pickler = cls(buffer, PROTOCOL, buffer_callback=partial(take_large, large))
    else:
        pickler = cls(buffer, PROTOCOL)
    pickler.transit = transit = Inline()
    pickler.met = set()
    if bare_exceptions:
        pickler.bare_exceptions = True
    try:
        pickler.dump(obj)
    except Exception:
        # It may be a slot of an exception that cannot be pickled; without us pickle leaves it out.
        if pickler.met and not bare_exceptions:
            return _dump(cls, obj, cache, bare_exceptions=True)
        raise
    if cache is not None and (large or buffer.tell() >= LARGE):
        bundle = with_memory([buffer.getbuffer()], large, transit, pickler, cache)
        if bundle is not None:
            return bundle
        if large:
            return _dump(cls, obj, None, bare_exceptions)
    data = buffer.getvalue()
    return Bundle(data, transit.fds, pickler) if transit.fds else data


# Most of what is sent is a socket by itself. Its pickle is the same for all of a kind, for which
# `describe` returns the same Kind object.
_BARE_TAGS: Final = frozenset({"socket", "descriptor"})
_bare_pickles: Final[dict[int, tuple[Kind, bytes]]] = {}
_REMEMBERED: Final = 256


def _bare_pickle(kind: Kind) -> tuple[Kind, bytes] | None:
    """*kind*, and the pickle of an object of it by itself."""
    if kind.tag not in _BARE_TAGS:
        return None
    entry = kind, bare_pickle(kind)
    if len(_bare_pickles) < _REMEMBERED:
        _bare_pickles[id(kind)] = entry
    return entry


def reduce_with(transit: Transit, pickler: HasReducers, obj: Any, cls: type) -> Override:
    """The reduce value of *obj*, of type *cls*; NotImplemented: *pickler* pickles it as without us.

    Raises: what `kinds.describe` and `check_code` raise.
    """
    if cls in describers:
        return _reduce_with_kind(transit, pickler, obj, cls)
    if cls is CodeType and CodeType in getattr(pickler, "dispatch", ()):  # dill's
        check_code(obj)
    if hasattr(cls, "fileno"):
        return _reduce_with_fileno(transit, pickler, obj, cls)
    if hasattr(cls, "__array_interface__") and in_shared_memory(obj):
        return _reduce_array(transit, pickler, obj, cls)
    if (cls.__module__ == "tempfile" or user_kinds) and is_shareable(cls):
        return _reduce_with_kind(transit, pickler, obj, cls)
    return NotImplemented


def _reduce_with_kind(transit: Transit, pickler: HasReducers, obj: Any, cls: type) -> Override:
    reducer = reducer_of_program(pickler, cls)
    if reducer is not None:
        return reducer(obj)
    if cls not in describers and pickles_itself(cls):
        return obj.__reduce_ex__(pickle.DEFAULT_PROTOCOL)
    return transit.carry(obj, *describe(obj))


def _reduce_array(transit: Transit, pickler: HasReducers, obj: Any, cls: type) -> Override:
    reducer = reducer_of_program(pickler, cls)
    if reducer is not None:
        return reducer(obj)
    reduced = reduce_array(transit, obj, cls)
    return NotImplemented if reduced is None else reduced


def _reduce_with_fileno(transit: Transit, pickler: HasReducers, obj: Any, cls: type) -> Override:
    if is_shareable(cls):
        return _reduce_with_kind(transit, pickler, obj, cls)
    if cls in copyreg.dispatch_table or cls in (pickler.dispatched or ()):
        return NotImplemented
    if issubclass(cls, selectors.BaseSelector) and not differs(cls, selectors.BaseSelector):
        # As without us. What it waits with would arrive as a descriptor, its files as others.
        raise TypeError(f"cannot pickle {cls.__qualname__!r} object")
    # A class of a program that has a fileno() method is pickled as the program wants. What cannot
    # be pickled at all (select.epoll) is carried as what it is: a descriptor.
    try:
        return obj.__reduce_ex__(pickle.DEFAULT_PROTOCOL)
    except TypeError:
        return transit.carry(obj, *describe(obj))
