"""Tasks and results of pools and executors: a pickle behind a head of three numbers.

What a caller submits is pickled in the call; what a worker returns is pickled in the worker. Who
reads for all jobs reads the head alone. The pickle is loaded for its own job: an error of that,
such as a class that does not exist or a descriptor limit, is this job's error, and does not end the
thread that reads.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from fdshare.errors import DescriptorLimit
from fdshare.kernel.ancillary import Bytes
from fdshare.kinds import is_shareable
from fdshare.mp.channels.connection import ConnectionMixin
from fdshare.mp.channels.framing import JOINED
from fdshare.mp.family import Family
from fdshare.mp.pickling.bundle import Arrived, Bundle, Loads, Reduced, as_bundle, open_arrived
from fdshare.mp.pickling.memfd_cache import MemfdCache
from fdshare.mp.pickling.program_reducers import pickles_itself, reducer_of_program
from fdshare.mp.pickling.reducers import dumps, encode
from fdshare.mp.stock import Function

if TYPE_CHECKING:
    from typing import Self

__all__ = [
    "CALL",
    "HEAD_SIZE",
    "LOADED_CALL",
    "MAPPED_CALL",
    "RAISED",
    "RETURNED",
    "Pickled",
    "Raised",
    "Task",
    "as_buffer",
    "beheaded",
    "has_head",
    "head_of",
    "headed",
    "hold_initializer",
    "outcome",
    "pickled",
    "receive_patiently",
    "release_initializer",
]

# Seconds that a reader of many jobs' messages waits at its descriptor limit before one job fails.
PATIENCE: Final = 5.0
PAUSE: Final = 0.02  # seconds between two attempts
_NO_LOCK: Final[AbstractContextManager[object]] = nullcontext()


# What is sent: a pickle; with descriptors, a bundle.
Pickled: TypeAlias = bytes | Bundle

# The form of what follows, and two numbers that the pool or the executor knows it by.
_HEAD: Final = struct.Struct("=Bqq")
HEAD_SIZE: Final = _HEAD.size
_unpack: Final = _HEAD.unpack_from
CALL: Final = 1  # (function, args, kwargs), to be loaded when the call is made
LOADED_CALL: Final = 2  # the same, to be loaded at once
MAPPED_CALL: Final = 3  # a MappedTask's
RETURNED: Final = 4
RAISED: Final = 5


def pickled(family: Family, obj: Any, cache: MemfdCache | None = None) -> Pickled:
    """As `encode`."""
    message = encode(family, obj, cache)
    if isinstance(message, bytes):
        return message
    bundle = as_bundle(message, obj)
    return bundle if bundle.numbers else bytes(bundle.data)


def headed(form: int, first: int, second: int, content: Pickled) -> Pickled:
    """The message of *content*, which keeps its descriptors."""
    head = _HEAD.pack(form, first, second)
    if isinstance(content, bytes):
        return head + content
    return Bundle(head + content.data, content.numbers, content)


def has_head(message: Arrived) -> bool:
    """True if `headed` has made it: no pickle begins with the number of a form."""
    if isinstance(message, tuple):
        return False
    data = message if isinstance(message, bytes) else message.data
    return bool(data) and data[0] <= RAISED


def beheaded(message: Arrived) -> tuple[int, int, int, Pickled]:
    """(form, first, second, content) of a *message* that `has_head`."""
    if type(message) is bytes and len(message) <= JOINED:
        return *_unpack(message), message[HEAD_SIZE:]
    bundle = Bundle(message) if isinstance(message, bytes) else message
    assert isinstance(bundle, Bundle)
    data = bundle.data
    # A long one is not copied.
    bundle.data = (memoryview(data) if len(data) > JOINED else data)[HEAD_SIZE:]
    return *_unpack(data), bundle


def head_of(message: Arrived) -> bytes:
    """What `headed` has put before the content; something shorter if it has not made *message*."""
    if isinstance(message, tuple):
        return b""
    data = message if isinstance(message, bytes) else message.data
    return bytes(data[:HEAD_SIZE])


def as_buffer(content: Pickled) -> Bytes:
    """The bytes of *content*, which has no descriptors."""
    return content if isinstance(content, bytes) else content.data


def outcome(family: Family, form: int, content: Pickled) -> tuple[bool, Any]:
    """(True, what the call returned) or (False, what it or loading that raised).

    For a thread that reads for all jobs: no exception of a pickle's, of any class, may end it.
    """
    try:
        return form == RETURNED, open_arrived(content, family.loads)
    except BaseException as error:
        return False, error


def open_call(content: Pickled, load: Loads) -> Any:
    """As `open_arrived`, for a worker. Raises: as that; what `not_loaded` says."""
    try:
        return open_arrived(content, load)
    except (Exception, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise not_loaded(error) from error


def not_loaded(error: BaseException) -> RuntimeError:
    """What to raise where loading a call raises *error*, which is no Exception, such as SystemExit:
    the worker would end, and nobody hear of the call."""
    return RuntimeError(f"loading the call raises {error!r}")


class Task:
    """A call, pickled: the receiver calls it to make the call."""

    __slots__ = ("content", "family")

    def __init__(self, family: Family, content: Pickled) -> None:
        self.family = family
        self.content = content

    @classmethod
    def of(
        cls,
        family: Family,
        call: tuple[Function, Iterable[Any], Mapping[str, Any]],
        cache: MemfdCache | None = None,
    ) -> Self:
        """The *call* of a function, with duplicates. It is safe to close what is in it after this
        call. *cache* is that of the end that sends it.

        Raises: whatever pickling raises; DescriptorLimit (EMFILE).
        """
        content = pickled(family, call, cache)
        return cls(family, content if isinstance(content, bytes) else content.share())

    def __call__(self) -> Any:
        function, args, kwargs = open_call(self.content, self.family.loads)
        return function(*args, **kwargs)

    @property
    def bundle(self) -> Bundle | None:
        """None: it has no descriptors."""
        return self.content if isinstance(self.content, Bundle) else None

    def close(self) -> None:
        """Closes what it has duplicated: it is sent, or will not be."""
        if self.bundle is not None:
            self.bundle.close()


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
    lock: AbstractContextManager[object] = _NO_LOCK,
    wait: Callable[[float], object] = time.sleep,
) -> Arrived:
    """The next message of *connection*, read under *lock*.

    At the descriptor limit it waits without the lock, for another process may have room. After
    PATIENCE seconds it returns the message without its descriptors, which raises the
    DescriptorLimit when it is loaded. *wait* is time.sleep, or returns True when the channel was
    ended: EOFError is raised then.

    Raises: as `MessageReceiver.fetch`.
    """
    deadline: float | None = None
    while True:
        with lock:
            try:
                return connection._receive()
            except DescriptorLimit as limit:
                now = time.monotonic()
                deadline = deadline or now + PATIENCE
                if now > deadline:
                    return connection._receive_without(limit)
        if wait(PAUSE):
            raise EOFError


# The arguments of initializers


class _Argument:
    """An argument of an initializer, for all workers that the pool starts in its life."""

    def __init__(self, family: Family, bundle: Bundle) -> None:
        self.family = family
        self.bundle = bundle

    def open(self) -> Any:
        """The argument. Called once in each worker, which has a copy of the pool's bundle."""
        return self.bundle.load(self.family.loads)

    def close(self) -> None:
        self.bundle.close()


class _Container:
    """A tuple, a list or a dict with one of these classes in the place of what is held."""

    def __init__(self, items: tuple[Any, ...] | list[Any] | dict[Any, Any]) -> None:
        self.items = items

    def open(self) -> Any:
        """The container, with the arguments in it."""
        if isinstance(self.items, dict):
            return {key: _open(item) for key, item in self.items.items()}
        return type(self.items)(map(_open, self.items))

    def close(self) -> None:
        items = self.items.values() if isinstance(self.items, dict) else self.items
        for item in items:
            if type(item) in _HELD:
                item.close()


# Looked for by type(): isinstance() asks the objects of a program for their __class__.
_HELD: Final = frozenset({_Argument, _Container})


def hold_initializer(
    family: Family, initializer: Function | None, initargs: Iterable[Any]
) -> tuple[Function | None, Iterable[Any]]:
    """*initializer* and *initargs* with duplicates of every descriptor in the arguments.

    They are found in tuples, lists and dicts; any other object that has one must stay open for the
    pool's life. Locks and queues can be pickled only while a process starts, so what is not found
    stays as it is, and so does what cannot be shared: a forked worker needs no pickle of it. It is
    safe to close what was found after this call.

    Raises: DescriptorLimit (EMFILE).
    """
    if initializer is None or not callable(initializer):
        return initializer, initargs
    initargs = tuple(initargs)  # it may be an iterator
    held = _hold(family, initargs, frozenset())
    return (initializer, initargs) if held is None else (_initialize, (initializer, held))


def release_initializer(initializer: Function | None, initargs: Iterable[Any]) -> None:
    """Closes what `hold_initializer` has duplicated: no worker will start any more."""
    if initializer is _initialize:
        _, held = initargs
        held.close()


def _hold(family: Family, value: Any, above: frozenset[int]) -> _Argument | _Container | None:
    """What is held of *value*; None: nothing. *above* has the containers that it is in: one that
    contains itself stays as it is there."""
    cls = type(value)
    if cls is tuple or cls is list or cls is dict:
        if id(value) in above:
            return None
        above |= {id(value)}
        items = value.values() if cls is dict else value
        held = [_hold(family, item, above) for item in items]
        if not any(held):
            return None
        new = [old if part is None else part for old, part in zip(items, held, strict=True)]
        return _Container(dict(zip(value, new, strict=True)) if cls is dict else cls(new))
    # What pickles itself may be made for a single loading, in a process that is being started.
    if not is_shareable(cls) or pickles_itself(cls) or reducer_of_program(family.Pickler, cls):
        return None
    try:
        return _Argument(family, dumps(family, value).own())
    except DescriptorLimit:
        raise
    except Exception:
        return None


def _initialize(initializer: Function, held: _Container) -> None:
    initializer(*held.open())


def _open(value: Any) -> Any:
    return value.open() if type(value) in _HELD else value
