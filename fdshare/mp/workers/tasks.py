"""Tasks and results of pools and executors, as bundles that are loaded for their own job alone.

What a caller submits is pickled in the call; what a worker returns is pickled in the worker. Both
are sent as a bundle inside the pool's own message. An error of loading it, such as a class that
does not exist or a descriptor limit, is then this job's error, and does not end the thread that
reads for all jobs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Final

from fdshare.errors import DescriptorLimit
from fdshare.kinds import is_shareable
from fdshare.mp.channels.connection import ConnectionMixin
from fdshare.mp.family import Family
from fdshare.mp.pickling.bundle import Bundle, Reduced
from fdshare.mp.pickling.program_reducers import pickles_itself, reducer_of_program
from fdshare.mp.pickling.reducers import dumps
from fdshare.mp.stock import Function

if TYPE_CHECKING:
    from typing import Self

__all__ = [
    "Outcome",
    "Raised",
    "Task",
    "hold_initializer",
    "receive_patiently",
    "release_initializer",
]

# Seconds that a reader of many jobs' messages waits at its descriptor limit before one job fails.
PATIENCE: Final = 5.0
PAUSE: Final = 0.02  # seconds between two attempts


class Task:
    """A call, pickled: the receiver calls it to make the call."""

    __slots__ = ("bundle", "family")

    def __init__(self, family: Family, bundle: Bundle) -> None:
        self.family = family
        self.bundle = bundle

    @classmethod
    def of(
        cls, family: Family, function: Function, args: Iterable[Any], kwargs: Mapping[str, Any]
    ) -> Self:
        """The call, with duplicates. It is safe to close what is in it after this call.

        Raises: whatever pickling raises; DescriptorLimit (EMFILE).
        """
        return cls(family, dumps(family, (function, args, kwargs)).share())

    def __call__(self) -> Any:
        function, args, kwargs = self.bundle.load(self.family.loads)
        return function(*args, **kwargs)

    def __reduce__(self) -> Reduced:
        return type(self), (self.family, self.bundle)


class Outcome:
    """What a call returned or raised, pickled."""

    __slots__ = ("bundle", "ok")

    def __init__(self, ok: bool, bundle: Bundle) -> None:
        self.ok = ok
        self.bundle = bundle

    @classmethod
    def of(cls, family: Family, ok: bool, value: Any) -> Outcome:
        """Raises: whatever pickling raises."""
        return cls(ok, dumps(family, value))

    def open(self, family: Family) -> tuple[bool, Any]:
        """(True, what it returned) or (False, what it or loading it raised)."""
        try:
            return self.ok, self.bundle.load(family.loads)
        except Exception as error:
            return False, error

    def __reduce__(self) -> Reduced:
        return Outcome, (self.ok, self.bundle)


class Raised:
    """An exception that is sent, to arrive with the worker's traceback as text in its cause."""

    __slots__ = ("error", "remote")

    def __init__(self, error: BaseException, remote: BaseException) -> None:
        """*remote* is what the package makes of the text."""
        self.error = error
        self.remote = remote

    def __reduce__(self) -> Reduced:
        return _raised, (self.error, self.remote)


def _raised(error: BaseException, remote: BaseException) -> BaseException:
    # BaseException's own setter: a class may forbid to set attributes.
    BaseException.__dict__["__cause__"].__set__(error, remote)
    return error


def receive_patiently(
    connection: ConnectionMixin,
    lock: AbstractContextManager[object] | None = None,
    wait: Callable[[float], object] = time.sleep,
) -> Any:
    """The next object of *connection*, an envelope of bundles, read under *lock*.

    At the descriptor limit it waits without the lock, for another process may have room. After
    PATIENCE seconds it returns the envelope without its descriptors, and the bundles that need
    them raise the DescriptorLimit when they are loaded. *wait* is time.sleep, or returns True when
    the channel was ended: EOFError is raised then.
    """
    guard = nullcontext() if lock is None else lock
    deadline = time.monotonic() + PATIENCE
    while True:
        with guard:
            try:
                message = connection.receive()
                break
            except DescriptorLimit as limit:
                if time.monotonic() > deadline:
                    return connection.receive_without(limit)
        if wait(PAUSE):
            raise EOFError
    return connection.decode(message)


# The arguments of initializers


class _Argument:
    """An argument of an initializer, for all workers that the pool starts in its life."""

    def __init__(self, family: Family, bundle: Bundle) -> None:
        self.family = family
        self.bundle = bundle

    def open(self) -> Any:
        """The argument. Called once in each worker, which has a copy of the pool's bundle."""
        return self.bundle.load(self.family.loads)


def hold_initializer(
    family: Family, initializer: Function | None, initargs: Iterable[Any]
) -> tuple[Function | None, Iterable[Any]]:
    """*initializer* and *initargs* with duplicates of every descriptor in the arguments.

    They are found in tuples, lists and dicts; any other object that has one must stay open for the
    pool's life. Locks and queues can be pickled only while a process starts, so what is not found
    stays as it is. It is safe to close what was found after this call.
    """
    if initializer is None or not callable(initializer):
        return initializer, initargs
    held = _hold(family, tuple(initargs))
    return (initializer, initargs) if held is None else (_initialize, (initializer, held))


def release_initializer(initializer: Function | None, initargs: Iterable[Any]) -> None:
    """Closes what `hold_initializer` has duplicated: no worker will start any more."""
    if initializer is _initialize:
        _release(tuple(initargs))


def _hold(family: Family, value: Any) -> Any:
    """*value* with an _Argument for each shareable object in it; None if there is none."""
    cls = type(value)
    if cls is tuple or cls is list:
        items = [_hold(family, item) for item in value]
        if all(item is None for item in items):
            return None
        return cls(old if new is None else new for old, new in zip(value, items, strict=True))
    if cls is dict:
        parts = {key: _hold(family, item) for key, item in value.items()}
        if all(part is None for part in parts.values()):
            return None
        return {key: value[key] if new is None else new for key, new in parts.items()}
    # What pickles itself may be made for a single loading, in a process that is being started.
    if not is_shareable(cls) or pickles_itself(cls) or reducer_of_program(family.Pickler, cls):
        return None
    return _Argument(family, dumps(family, value).own())


def _initialize(initializer: Function, held: tuple[Any, ...]) -> None:
    initializer(*_open(held))


def _open(value: Any) -> Any:
    cls = type(value)
    if cls is tuple or cls is list:
        return cls(map(_open, value))
    if cls is dict:
        return {key: _open(item) for key, item in value.items()}
    return value.open() if cls is _Argument else value


def _release(value: Any) -> None:
    cls = type(value)
    if cls is _Argument:
        value.bundle.close()
    elif cls is tuple or cls is list or cls is dict:
        for item in value.values() if cls is dict else value:
            _release(item)
