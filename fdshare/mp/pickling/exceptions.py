"""Exceptions arrive whole: with every attribute, traceback, notes, cause and context.

`BaseException.__reduce__` calls the class again with `args`, which fails where its constructor
takes others, and loses what C keeps outside `args` and `__dict__`. Here the object is made without
its constructor, and gets back each member, each slot and its `__dict__`. A class that has a
`__reduce__` of its own is pickled by that.

Whatever cause and context are, they do not cost the error itself. Each exception of the chain has a
pickle of its own inside that of the error. One that cannot be pickled, or not be unpickled where it
arrives, is left out, and a note says so. (An exception that is an attribute of the error, too, is
in the error's own pickle, and is the same object when it arrives.)
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import cache
from types import GetSetDescriptorType, MemberDescriptorType
from typing import Any, Final, NamedTuple, Protocol, TypeAlias

from fdshare.mp.pickling.bundle import Loads, load_part
from fdshare.mp.pickling.program_reducers import HasReducers, reducer_of_program

__all__ = ["ChainPickler", "Links", "reduce_exception", "reduce_links"]


class ChainPickler(HasReducers, Protocol):
    """What pickles exceptions."""

    met: set[int]  # the ids of the exceptions in this pickle
    unlinked: frozenset[
        int
    ]  # of those that are pickled without cause and context: an outer has them

    @staticmethod
    def loads(data: bytes | memoryview, /) -> Any:
        """The object of a pickle of this pickler's."""
        ...

    def part(self, obj: object, unlinked: frozenset[int]) -> bytes:
        """A pickle of *obj* inside this one. Raises: whatever pickling raises."""
        ...

    def small_part(self, obj: object, unlinked: frozenset[int]) -> bytes | None:
        """The same; None: it cannot be pickled, is long, or has descriptors."""
        ...


# BaseException's own, whatever a class says.
_cause: Final = BaseException.__dict__["__cause__"]
_context: Final = BaseException.__dict__["__context__"]
_suppress: Final = BaseException.__dict__["__suppress_context__"]
_traceback: Final = BaseException.__dict__["__traceback__"]
_MEMBERS: Final = frozenset({MemberDescriptorType, GetSetDescriptorType})
_HEAP_TYPE: Final = 1 << 9  # Py_TPFLAGS_HEAPTYPE: not a class that C defines once and for all


class _Beside(NamedTuple):
    """What every exception has beside what its class defines."""

    traceback: Any
    notes: Any
    suppress: bool
    links: Any


def reduce_exception(pickler: ChainPickler, error: BaseException) -> Any:
    """The reduce value of *error*. Raises: what a `__reduce__` of the program's raises."""
    cls = type(error)
    pickler.met.add(id(error))
    has_links = _cause.__get__(error) is not None or _context.__get__(error) is not None
    beside = _Beside(
        _traceback.__get__(error),
        vars(error).get("__notes__"),
        _suppress.__get__(error),
        Links(error) if has_links and id(error) not in pickler.unlinked else None,
    )
    reducer = reducer_of_program(pickler, cls)
    if reducer is not None or _is_programs(cls, "__reduce__", "__reduce_ex__"):
        reduced = reducer(error) if reducer is not None else error.__reduce_ex__(4)
        if not isinstance(reduced, tuple):
            return reduced
        parts: list[Any] = [*reduced, None, None, None, None]
        make, args, state, items, pairs, setter = parts[:6]
        return make, args, (state, setter, tuple(beside)), items, pairs, _restore_reduced
    state = error.__getstate__() if _is_programs(cls, "__getstate__") else dict(vars(error))
    members = _members(error)
    obj = None
    if "obj" in members and isinstance(error, AttributeError):
        # Any object of the program's, which CPython leaves out of the pickle.
        obj = pickler.small_part(members.pop("obj"), pickler.unlinked | {id(error)})
    # The links come last, when the exceptions among the attributes are pickled.
    all_of_it = members, state, obj and (pickler.loads, obj), tuple(beside)
    return _new, (cls, *_arguments(error)), all_of_it, None, None, _restore


def _is_programs(cls: type, *names: str) -> bool:
    """True if one of the methods *names* is not one that C defines."""
    if not cls.__flags__ & _HEAP_TYPE:
        return False
    for name in names:
        for base in cls.__mro__:
            if name in vars(base):
                if base.__flags__ & _HEAP_TYPE:
                    return True
                break
    return False


def _arguments(error: BaseException) -> tuple[Any, ...]:
    """What cannot be set later."""
    return (error.message, error.exceptions) if isinstance(error, BaseExceptionGroup) else ()


def _descriptors(cls: type) -> list[tuple[str, Any]]:
    """The names and descriptors of members in C structures and of slots."""
    found: list[tuple[str, Any]] = []
    for base in cls.__mro__:
        found += _own(base) if base.__flags__ & _HEAP_TYPE else _own_for_good(base)
    return found


def _own(cls: type) -> list[tuple[str, Any]]:
    """Those of *cls* without its bases."""
    return [
        (name, found)
        for name, found in vars(cls).items()
        if type(found) in _MEMBERS and not (name[:2] == "__" and name[-2:] == "__")
    ]


_own_for_good: Final = cache(_own)  # a class that C defines does not change, and does not go


def _members(error: BaseException) -> dict[str, Any]:
    members: dict[str, Any] = {}
    for name, descriptor in _descriptors(type(error)):
        if name in members:
            continue
        try:
            members[name] = descriptor.__get__(error)
        except AttributeError:
            pass  # it was never set
    for name in ("message", "exceptions") if isinstance(error, BaseExceptionGroup) else ():
        members.pop(name, None)
    return members


# Making one again. Pickles name these functions.


def _new(cls: type[BaseException], *args: Any) -> BaseException:
    """An object of *cls*, by its nearest class in C: no code of the program's runs."""
    static: Any = (base for base in cls.__mro__ if not base.__flags__ & _HEAP_TYPE)
    base = next(base for base in static if issubclass(base, BaseException))
    made: BaseException = base.__new__(cls, *args)
    return made


def _restore(error: BaseException, state: tuple[Any, ...]) -> None:
    members, attributes, obj, beside = state
    for name, descriptor in _descriptors(type(error)):
        if name not in members:
            continue
        value = members.pop(name)
        try:
            if value is not None or not _is_none(descriptor, error):
                descriptor.__set__(error, value)
        except (AttributeError, TypeError):
            pass  # it can only be read
    if obj is not None:
        with suppress(Exception):  # it is no part of the error
            error.obj = load_part(*obj)  # type: ignore[attr-defined]
    if _is_programs(type(error), "__setstate__"):
        error.__setstate__(attributes)
    else:
        vars(error).update(attributes)
    _add_beside(error, _Beside(*beside))


def _is_none(descriptor: Any, error: BaseException) -> bool:
    """True if it is None already: an OSError prints a filename of None if that was set."""
    try:
        return descriptor.__get__(error) is None
    except AttributeError:  # a slot, not set yet
        return False


def _restore_reduced(error: BaseException, reduced: tuple[Any, ...]) -> None:
    """*error* was made as its class wants, and gets its state as pickle gives it."""
    state, setter, beside = reduced
    if setter is not None:
        setter(error, state)
    elif state is not None:
        error.__setstate__(state)  # every exception has one
    if isinstance(error, BaseException):
        _add_beside(error, _Beside(*beside))


def _add_beside(error: BaseException, beside: _Beside) -> None:
    _traceback.__set__(error, beside.traceback)
    if beside.notes is not None:
        vars(error).setdefault("__notes__", beside.notes)
    if beside.links is not None:
        beside.links()
    _suppress.__set__(error, beside.suppress)


# The chain

# The name of its class; its pickle, or why there is none.
_Part: TypeAlias = tuple[str, bytes | str]
_Lost: TypeAlias = tuple[str, str]  # one of which there is none
# The positions of cause and context, and whether the context is suppressed.
_Edge: TypeAlias = tuple[int | None, int | None, bool]


class Links:
    """Stands in the state of *error* for its cause and context. It is pickled after the attributes:
    what is among these needs no pickle of its own."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


def reduce_links(pickler: ChainPickler, links: Links) -> Any:
    """The reduce value of *links*: all exceptions from its error on, and how they are linked."""
    chain = [links.error]
    positions = {id(links.error): 0}

    def position(other: BaseException | None) -> int | None:
        if other is None:
            return None
        if id(other) not in positions:
            positions[id(other)] = len(chain)
            chain.append(other)
        return positions[id(other)]

    edges: list[_Edge | None] = []
    for error in chain:  # which grows
        if edges and id(error) in pickler.met:
            edges.append(None)  # it has its own links
            continue
        cause, context = _cause.__get__(error), _context.__get__(error)
        edges.append((position(cause), position(context), _suppress.__get__(error)))
    unlinked = pickler.unlinked | frozenset(positions)
    members = [
        error if id(error) in pickler.met else _part(pickler, error, unlinked) for error in chain
    ]
    return _open_links, (pickler.loads, members, edges)


def _part(pickler: ChainPickler, error: BaseException, unlinked: frozenset[int]) -> _Part:
    try:
        return type(error).__qualname__, pickler.part(error, unlinked)
    except Exception as reason:
        return type(error).__qualname__, f"it cannot be pickled: {_text(reason)}"


def _text(error: BaseException) -> str:
    try:
        return f"{type(error).__qualname__}: {error}"
    except Exception:  # a __str__ of the program's
        return type(error).__qualname__


def _open_links(
    loads: Loads, members: list[BaseException | _Part], edges: list[_Edge | None]
) -> Callable[[], None]:
    """A function that links what has arrived. Pickles name this function."""
    chain = [_open(loads, member) for member in members]

    def link() -> None:
        for error, edge in zip(chain, edges, strict=True):
            if isinstance(error, BaseException) and edge is not None:
                _link(error, edge, chain)

    return link


def _open(loads: Loads, member: BaseException | _Part) -> BaseException | _Lost:
    if isinstance(member, BaseException):
        return member
    name, data = member
    if isinstance(data, str):
        return name, data
    try:
        error = load_part(loads, data)
    except Exception as reason:
        return name, f"it cannot be unpickled: {_text(reason)}"
    return error if isinstance(error, BaseException) else (name, "it became another object")


def _link(error: BaseException, edge: _Edge, chain: list[BaseException | _Lost]) -> None:
    *ends, suppressed = edge
    for descriptor, role, end in ((_cause, "cause", ends[0]), (_context, "context", ends[1])):
        if end is None:
            continue
        other = chain[end]
        if isinstance(other, BaseException):
            descriptor.__set__(error, other)
        elif role == "cause" or end != ends[0]:
            _note(error, f"The {role} of this exception ({other[0]}) is left out: {other[1]}")
    _suppress.__set__(error, suppressed)


def _note(error: BaseException, text: str) -> None:
    notes = vars(error).setdefault("__notes__", [])
    if isinstance(notes, list):
        notes.append(text)
