"""The tasks of a map, while they wait for a worker.

Each is a function with a batch of items, pickled in the call of `map`. But what cannot change needs
no pickle so early: of a range, and where all items are numbers and text and a batch has few, the
function is pickled in the call, and each batch when it is sent. So 100,000 of them that wait take
the memory of a copy of the list, and none where the program has given a range or a tuple.
"""

from __future__ import annotations

import pickle
import struct
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any, Final, TypeAlias

from fdshare.mp.family import Family
from fdshare.mp.pickling.memfd_cache import MemfdCache
from fdshare.mp.pickling.plain import PROTOCOL
from fdshare.mp.pickling.program_reducers import leaves_built_in
from fdshare.mp.stock import Function
from fdshare.mp.workers.tasks import Pickled, Task, as_buffer, not_loaded, pickled

__all__ = ["MappedTask", "Numbered", "WaitingTasks", "tasks_of_map"]

# What a pool's thread sends: job, index, function, args, kwds.
Numbered: TypeAlias = tuple[int, int, Function, tuple[Any, ...], dict[str, Any]]

_CONSTANT: Final = frozenset({int, str, bytes, float, bool, type(None)})
_NO_KWDS: Final[dict[str, Any]] = {}  # one for all: there may be 100,000 tasks
# Items of a task up to which a look at each costs less than the memory of a pickle that waits.
_FEW: Final = 16
# A range needs no look. But where its batches are long they are pickled in the call: a pickle that
# is large goes through memory of its own (large.py), and 2**15 numbers below 10**10 are less.
_MOST: Final[dict[type, int]] = {range: 1 << 15, tuple: _FEW, list: _FEW}
# Whether each item is a tuple of arguments, and how long the pickle of the function is.
_HEAD: Final = struct.Struct("=?Q")
_SIZE: Final = _HEAD.size
_unpack: Final = _HEAD.unpack_from


class MappedTask(Task):
    """A Task of two pickles: a function of the program, and a batch of items."""

    __slots__ = ()

    def __call__(self) -> Any:
        data = as_buffer(self.content)
        starred, size = _unpack(data)
        end = _SIZE + size
        try:
            function = self.family.loads(data[_SIZE:end])
            items = pickle.loads(data[end:])
        except (Exception, KeyboardInterrupt):
            raise
        except BaseException as error:
            raise not_loaded(error) from error
        pool = self.family.pool
        mapper = pool.starmapstar if starred else pool.mapstar
        return mapper((function, items))


class WaitingTasks(Iterator[Numbered]):
    """The tasks of a map that are not sent yet. Who takes one closes it."""

    job = -1  # the number of the map, set before the first is taken

    def __init__(self, family: Family) -> None:
        self._family = family
        self._index = -1

    def __next__(self) -> Numbered:
        function, args = self._next()
        self._index += 1
        return self.job, self._index, function, args, _NO_KWDS

    def _next(self) -> tuple[Function, tuple[Any, ...]]:
        raise NotImplementedError

    def close(self) -> None:
        """Closes what nobody has taken."""


class _Pickled(WaitingTasks):
    """Tasks that are pickled."""

    def __init__(self, family: Family, contents: Iterable[Pickled]) -> None:
        super().__init__(family)
        self._contents = deque(contents)

    def _next(self) -> tuple[Function, tuple[Any, ...]]:
        if not self._contents:
            raise StopIteration
        return Task(self._family, self._contents.popleft()), ()

    def close(self) -> None:
        while self._contents:
            Task(self._family, self._contents.popleft()).close()


class _Constant(WaitingTasks):
    """Tasks whose items cannot change, and are pickled when they are taken."""

    def __init__(
        self, family: Family, starred: bool, function: bytes, batches: Iterator[Any]
    ) -> None:
        super().__init__(family)
        self._head = _HEAD.pack(starred, len(function)) + function
        self._batches = batches

    def _next(self) -> tuple[Function, tuple[Any, ...]]:
        batch = next(self._batches)
        try:
            return MappedTask(self._family, self._head + pickle.dumps(batch, PROTOCOL)), ()
        except MemoryError as error:  # the thread must not end by it
            return self._family.pool._helper_reraises_exception, (error,)


def tasks_of_map(
    family: Family,
    mapper: Function,
    function: Function,
    items: Iterable[Any],
    size: int,
    cache: MemfdCache | None = None,
) -> WaitingTasks:
    """The tasks of *mapper*, a function of the pool's, with *function* and so many of *items* each.
    *cache* is that of the end that sends them.

    It is safe to change *items* and to close what is in it after this call. Raises: whatever
    pickling raises; DescriptorLimit.
    """
    if 0 < size <= _MOST.get(type(items), 0):
        kept = tuple(items) if type(items) is list else items
        starred = mapper is family.pool.starmapstar
        is_known = starred or mapper is family.pool.mapstar
        alone = pickled(family, function) if is_known and _is_constant(family, kept) else None
        if isinstance(alone, bytes):
            return _Constant(family, starred, alone, _batches(kept, size))
    calls = ((function, batch) for batch in _batches(items, size))
    return _Pickled(
        family, [Task.of(family, (mapper, (call,), {}), cache).content for call in calls]
    )


def _batches(items: Iterable[Any], size: int) -> Iterator[tuple[Any, ...]]:
    left = iter(items)
    while batch := tuple(islice(left, size)):
        yield batch


def _is_constant(family: Family, items: Iterable[Any]) -> bool:
    """True if *items* are numbers and text, or all are tuples of those, and pickled as such."""
    if not leaves_built_in(family.Pickler.dispatched):
        return False
    if type(items) is range:
        return True
    types = set(map(type, items))
    if types == {tuple}:  # a starmap's
        types = set(map(type, chain.from_iterable(items)))
    return types <= _CONSTANT
