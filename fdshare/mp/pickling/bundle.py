"""How descriptors travel beside a pickle.

A reducer gives each object's descriptors to the *transit* of the pickle, and writes what the
transit returns into the stream. `Inline` is the transit of our own channels: the descriptors are
sent in the sendmsg(2) of the pickle itself, and the stream holds their positions in it. (`Parked`
is the transit of all other channels: a server holds the descriptors, and the stream holds a key.)

A pickle and its descriptors together are a `Bundle`. It is made in the call (`put`, `submit`), so
that the object may be closed straight after, and decoded by its receiver, so that an error of
decoding is raised there.
"""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol, TypeAlias

from msgspec import Raw

from fdshare.errors import AlreadyTaken, DescriptorLimit, NoTransit
from fdshare.kernel import system
from fdshare.kernel.ancillary import Bytes, discard_all
from fdshare.kernel.descriptor import Descriptor, Spare
from fdshare.kernel.descriptor_limit import as_limit
from fdshare.kernel.shared_duplicate import SharedDuplicate, share
from fdshare.kinds import Kind, discard, rebuild, rebuilder
from fdshare.mp.pickling.array_pickles import array_maps, may_be_remembered, remember_array
from fdshare.mp.pickling.large import BALLAST, LARGE, NEW, NEW_PICKLE, map_parts
from fdshare.mp.pickling.memfd_cache import MemfdCache, Piece, new_copy_of, offsets

__all__ = [
    "Arrived",
    "Bundle",
    "Encoded",
    "Inline",
    "Loads",
    "Made",
    "Reduced",
    "Reducing",
    "Transit",
    "as_bundle",
    "bare_pickle",
    "load_part",
    "loads",
    "made_at_once",
    "open_arrived",
    "pickle_of_large",
    "with_memory",
]

Reduced: TypeAlias = tuple[Callable[..., Any], tuple[Any, ...]]

# A package's: the object of a pickle, and of *buffers*, a keyword, that were taken out of it.
Loads: TypeAlias = Callable[..., Any]


class Transit(Protocol):
    """Carries the descriptors of one pickle. It is told whether pickling succeeded."""

    def carry(self, obj: Any, kind: Kind, fds: list[int]) -> Reduced:
        """What `reduce` returns for *obj*: a callable that rebuilds it, and picklable arguments.

        *fds* are borrowed from *obj*, which the transit keeps alive as long as it needs them.
        """
        ...

    def commit(self) -> None:
        """The pickle is complete. If this raises, the pickle must not be sent."""
        ...

    def rollback(self) -> None:
        """The pickle failed: releases everything. Never raises."""
        ...


class Inline:
    """The descriptors are sent with the bytes, in the order in which they were pickled."""

    __slots__ = ("fds",)

    def __init__(self) -> None:
        self.fds: list[int] = []

    def carry(self, obj: Any, kind: Kind, fds: list[int]) -> Reduced:
        first = len(self.fds)
        self.fds += fds
        # The pickler's memo keeps *obj* alive, and the bundle keeps the pickler.
        if len(fds) == 1:
            return _arrive, (kind.tag, bytes(kind.spec), first)
        return _arrive, (kind.tag, bytes(kind.spec), first, len(fds))

    def carry_bundle(self, bundle: Bundle) -> Reduced:
        """The same for *bundle*, which its receiver loads later: what an initializer is given."""
        first, fds = len(self.fds), bundle.numbers
        self.fds += fds
        return _rebundle, (bytes(bundle.data), first, len(fds))

    def commit(self) -> None:
        pass

    def rollback(self) -> None:
        self.fds.clear()


class Bundle:
    """A pickle and its descriptors, which are borrowed from the objects pickled, or owned.

    Borrowed ones are valid while the objects are open, so for the length of one call. `share()`
    duplicates them, to be sent later; `own()`, to be loaded here. What it has then is closed when
    it is collected.
    """

    __slots__ = ("__weakref__", "data", "fds", "holders", "memory", "missing", "owned")

    def __init__(
        self,
        data: bytes | memoryview,
        fds: list[int] | None = None,
        holders: object = None,
        owned: list[Descriptor] | None = None,
        memory: Descriptor | None = None,
    ) -> None:
        """*fds* are borrowed from *holders*, but the last one from *memory*, if that is given,
        which is taken over; or it owns the descriptors *owned*."""
        self.data = data
        self.fds = fds
        self.holders = holders
        self.owned = owned
        self.memory = memory
        # Why descriptors that belong to it did not arrive.
        self.missing: BaseException | None = None

    @property
    def numbers(self) -> list[int]:
        """The descriptors' numbers, borrowed from this bundle."""
        if self.owned:
            return [descriptor.fileno() for descriptor in self.owned]
        return self.fds or []

    def own(self) -> Bundle:
        """This bundle, with duplicates. It is safe to close what was pickled after this call.

        Raises: DescriptorLimit (EMFILE); ClosedDescriptor. The bundle stays borrowed.
        """
        if self.fds:
            copies: list[Descriptor] = []
            try:
                copies.extend(map(Spare.dup_of, self._of_objects()))
            except BaseException as error:
                discard_all(copies)
                raise as_limit(error) from None
            if self.memory is not None:
                copies.append(self.memory)
            self.owned = copies
        self.fds = self.holders = self.memory = None
        return self

    def share(self) -> Bundle:
        """This bundle, with duplicates that it shares with every other one that has some of the
        same descriptions. It is safe to close what was pickled after this call.

        Where Python runs without the GIL, they are its own, which `close` closes at once. Shared
        ones would be closed when the thread that made them runs next.

        Raises: as `own`.
        """
        fds = self._of_objects()
        if not fds:
            self.holders = None
            return self
        if not system.HAS_GIL:
            return self.own()
        shared: list[SharedDuplicate] = []
        try:
            shared.extend(map(share, fds))
        except BaseException as error:
            shared.clear()  # a traceback has this frame
            raise as_limit(error) from None
        fds = [duplicate.fileno() for duplicate in shared]
        if self.memory is not None:
            fds.append(self.memory.fileno())
        self.fds, self.holders = fds, shared  # together, with no call in between
        return self

    def _of_objects(self) -> list[int]:
        """The borrowed descriptors; that of the memory is this bundle's own."""
        fds = self.fds or []
        return fds if self.memory is None else fds[:-1]

    def load(self, load: Loads) -> Any:
        """The object; to be called once. The caller owns what is in it.

        Raises: whatever unpickling raises; every descriptor is closed then, but where one more was
        needed to import what an object takes, and none was free (DescriptorLimit), it may still
        have all: then `numbers` is not empty, and it can be called again.
        """
        owned, self.owned = self.owned or [], None
        data = self.data
        if len(owned) == 1 and type(data) is bytes:
            make = made_at_once.get(data)
            if make is not None:
                try:
                    return owned[0].hand_to(make)
                except BaseException:
                    owned[0].close()
                    raise
            kind = _bare_pickles.get(data)
            if kind is not None:
                return rebuild(kind, owned)
            map_array = array_maps.get(data)
            if map_array is not None:
                with owned[0] as memory:
                    return map_array(memory.fileno())
        if self.missing is not None:
            discard_all(owned)
            raise self.missing
        try:
            return loads(load, data, owned)
        except DescriptorLimit:
            self.owned = owned
            raise

    def close(self) -> None:
        """Closes what it owns, and drops what it shares."""
        owned, self.owned = self.owned, None
        memory, self.memory = self.memory, None
        self.fds = self.holders = None
        if memory is not None:
            memory.close()
        if owned:
            discard_all(owned)

    def __reduce__(self) -> Reduced:
        raise NoTransit("Bundle")  # our picklers have a transit, which carries it


def with_memory(
    pickled: Sequence[Bytes],
    large: Sequence[memoryview],
    transit: Inline,
    holders: object,
    cache: MemfdCache,
) -> Bundle | None:
    """The bundle of a pickle, in memory of *cache*: what is *pickled*, if it is large, and the
    *large* buffers beside it. *transit* and *holders* are those of the pickle. None: there is no
    memory, or the socket takes less time."""
    sizes = [len(buffer) for buffer in large]
    beside = sum(sizes)
    size = sum(map(len, pickled))
    data = None
    if size < LARGE:
        data = b"".join(pickled)
    else:
        sizes.append(size)
    starts = [*offsets(sizes)]
    pieces: list[Piece] = [*zip(starts, large, strict=False)]
    end = starts[-1]
    if data is None:
        for part in pickled:
            pieces.append((end, part))
            end += len(part)
    else:
        end += sizes[-1]
    memory, ballast = cache.copy_of(pieces, end), b""
    if memory is None and (beside >= NEW or beside + size >= NEW_PICKLE):
        memory, ballast = new_copy_of(pieces), BALLAST
    if memory is None:
        return None
    outer = pickle_of_large(len(transit.fds), tuple(sizes), data, ballast)
    transit.fds.append(memory.fileno())
    return Bundle(outer, transit.fds, holders, memory=memory)


def pickle_of_large(
    index: int, sizes: tuple[int, ...], data: bytes | None, ballast: bytes = b""
) -> bytes:
    """The pickle that is sent with memory: the arguments are those of `_arrive_large`."""
    return pickle.dumps(Reducing((_arrive_large, (index, sizes, data, ballast))))


# What a channel is given: a pickle without descriptors; one with; or, of an object by itself that
# is sent often, its pickle, the same bytes object each time, and its descriptors, borrowed.
Encoded: TypeAlias = bytes | Bundle | tuple[bytes, list[int]]

Made: TypeAlias = tuple[Any]  # (an object,) that was made where its message was read
# What it gives: a pickle without descriptors; one with; or an object.
Arrived: TypeAlias = bytes | Bundle | Made


def as_bundle(message: Encoded, holders: object = None) -> Bundle:
    """*message* as a bundle. The descriptors of a pair stay borrowed from *holders*."""
    if isinstance(message, bytes):
        return Bundle(message)
    return Bundle(*message, holders) if isinstance(message, tuple) else message


def open_arrived(message: Arrived, load: Loads) -> Any:
    """The object in *message*; to be called once. The caller owns what is in it.

    Raises: as `Bundle.load`; every descriptor is closed then.
    """
    if isinstance(message, bytes):
        return load(message)
    if isinstance(message, tuple):
        return message[0]
    try:
        return message.load(load)
    except DescriptorLimit:
        message.close()
        raise


# Loading


class _Frame:
    """The descriptors of the message that this thread is decoding."""

    __slots__ = ("bare", "built", "descriptors", "large", "limit", "load")

    def __init__(self, load: Loads, descriptors: list[Descriptor]) -> None:
        self.load = load
        self.descriptors: list[Descriptor | None] = list(descriptors)
        self.built: list[Any] = []
        self.bare: Kind | None = None  # of the last object built
        # The pickle of an object with one large buffer, and the bytes of that.
        self.large: tuple[bytes, int] | None = None
        # Why an object could not be built, whose descriptors are here again.
        self.limit: DescriptorLimit | None = None

    def take(self, tag: str, first: int, count: int) -> list[Descriptor]:
        """The caller owns the result. Raises: AlreadyTaken: it is not all there."""
        mine: list[Descriptor] = []
        for index in range(first, first + count):
            descriptor = self.descriptors[index] if index < len(self.descriptors) else None
            if descriptor is None:
                discard_all(mine)
                raise AlreadyTaken(tag)
            self.descriptors[index] = None
            mine.append(descriptor)
        return mine

    def put_back(self, first: int, mine: list[Descriptor]) -> None:
        """The reverse of `take`."""
        self.descriptors[first : first + len(mine)] = mine

    def is_whole(self, error: BaseException) -> bool:
        """True if *error* is that of an object that could not be built, and none was."""
        return error is self.limit and not self.built and None not in self.descriptors

    def close(self, built: bool) -> None:
        discard_all(descriptor for descriptor in self.descriptors if descriptor is not None)
        if built:
            for obj in self.built:
                discard(obj)


class _Local(threading.local):
    frame: _Frame | None = None


_local: Final = _Local()


def loads(load: Loads, data: bytes | memoryview, descriptors: list[Descriptor]) -> Any:
    """The object that *load* makes of *data*, which holds positions in *descriptors*.

    *descriptors* belong to this call: those that no object in the pickle takes are closed, and all
    of them if loading fails. It empties the list then, unless all are still open: at the descriptor
    limit (DescriptorLimit), before an object was built.
    """
    outer = _local.frame
    frame = _local.frame = _Frame(load, descriptors)
    try:
        obj = load(data)
    except BaseException as error:
        whole, frame.limit = frame.is_whole(error), None  # its traceback has this frame
        if not whole:
            descriptors.clear()
            frame.close(built=True)
        raise
    finally:
        _local.frame = outer
    frame.close(built=False)
    if len(descriptors) == 1 and frame.bare is not None and frame.built and frame.built[0] is obj:
        _remember(bytes(data), frame.bare)
    if len(descriptors) == 1 and frame.large is not None and may_be_remembered(obj):
        inner, size = frame.large
        if data == pickle_of_large(0, (size,), inner):
            remember_array(bytes(data), obj, inner, size)
    return obj


def load_part(load: Loads, data: bytes) -> Any:
    """The object of a pickle inside the one that is being loaded.

    Raises: whatever unpickling raises; what was built of it is closed then.
    """
    frame = _local.frame
    built = len(frame.built) if frame is not None else 0
    try:
        return load(data)
    except BaseException:
        if frame is not None:
            for obj in frame.built[built:]:
                discard(obj)
            del frame.built[built:]
        raise


class Reducing:
    """Pickles as *reduced*."""

    def __init__(self, reduced: Reduced) -> None:
        self._reduced = reduced

    def __reduce__(self) -> Reduced:
        return self._reduced


def bare_pickle(kind: Kind) -> bytes:
    """The pickle of an object of *kind* by itself, with one descriptor."""
    return pickle.dumps(Reducing(Inline().carry(None, kind, [0])))


# The pickles that are one object with one descriptor, as reducers.py makes them for sockets: the
# same few bytes each time. Those seen before are not unpickled.
_bare_pickles: Final[dict[bytes, Kind]] = {}
# Those of them that a channel may build while it holds its lock, since that runs no code of the
# program and does not block, and what builds the object of a descriptor's number.
made_at_once: Final[dict[bytes, Callable[[int], Any]]] = {}
_REMEMBERED: Final = 256
_LONGEST: Final = 256  # bytes


def _remember(data: bytes, kind: Kind) -> None:
    if len(_bare_pickles) < _REMEMBERED and len(data) <= _LONGEST:
        # Functions of the program that return the object may be in the pickle, to be called each
        # time: only the bytes tell that there is nothing but the object.
        if data != bare_pickle(kind):
            return
        _bare_pickles[data] = kind
        make = rebuilder(kind)
        if make is not None:
            made_at_once[data] = make


def _arrive_large(index: int, sizes: tuple[int, ...], data: bytes | None, ballast: bytes) -> Any:
    """The object of the pickle *data*, whose buffers, of these *sizes* in bytes, are in a memfd;
    None: the pickle is there, too, behind them. Pickles name it: do not move or rename."""
    frame = _local.frame
    if frame is None:
        raise AlreadyTaken("memory")
    (memory,) = frame.take("memory", index, 1)
    with memory:
        parts = map_parts(memory.fileno(), sizes)
    if data is not None and len(sizes) == 1:
        frame.large = data, sizes[0]
    return frame.load(parts.pop() if data is None else data, buffers=parts)


def _arrive(tag: str, spec: bytes, first: int, count: int = 1) -> Any:
    """An object of the pickle that is being loaded. Pickles name it: do not move or rename."""
    frame = _local.frame
    if not count:
        return rebuild(Kind(tag, Raw(spec)), [])
    if frame is None:
        raise AlreadyTaken(tag)
    mine = frame.take(tag, first, count)
    frame.bare = kind = Kind(tag, Raw(spec))
    # Into the list at once, where it is closed: a signal's handler may raise after any call.
    try:
        frame.built.extend(map(rebuild, (kind,), (mine,), (True,)))
    except DescriptorLimit as limit:
        if not any(descriptor.closed for descriptor in mine):
            frame.put_back(first, mine)
            frame.limit = limit
        raise
    return frame.built[-1]


def _rebundle(data: bytes, first: int, count: int) -> Bundle:
    """A bundle in the pickle that is being loaded. Pickles name it: do not move or rename."""
    frame = _local.frame
    if not count:
        return Bundle(data)
    if frame is None:
        raise AlreadyTaken("bundle")
    return Bundle(data, owned=frame.take("bundle", first, count))
