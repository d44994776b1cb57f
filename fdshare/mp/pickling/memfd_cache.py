"""The memory of large messages: memfds, of which a sending end uses a few again and again.

For the kernel new pages are more work than to copy into them (docs/performance.md), so the end of a
channel keeps some memfds. Each message is sent with an open file description of its own, which has
flock(2). The receiver maps that and closes its descriptor: the map holds the description, and with
it the lock, and so does each copy of the map in a forked child. The kernel releases the lock with
the last of them, also with that of a process that is killed (__fput, fs/file_table.c). So whoever
gets the lock knows that nobody sees what is in the memory. No receiver has to say anything.

What is kept is used for one channel only, whose readers may read each message of it in any case.
None of them can change what another one reads: the description is open for reading, and the mode
lets nobody open it for more, but who may change the mode. That is root and the sender's own user,
who could do the same through the sender's /proc/PID/fd. And it cannot shrink: that is sealed.

The memory has no name, so a process that is killed leaves nothing behind.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import resource
import weakref
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import count
from operator import attrgetter
from typing import Final, TypeAlias

from fdshare.kernel import system
from fdshare.kernel.ancillary import Bytes
from fdshare.kernel.descriptor import Spare
from fdshare.kernel.memfd import create_memfd_into, shared_map

__all__ = ["MemfdCache", "MessageMemory", "Piece", "new_copy_of", "offsets"]

# Where in the memory, in bytes, and what is written there.
Piece: TypeAlias = tuple[int, Bytes]

_OWN: Final = "/proc/self/fd/%d"
_READ: Final = (os.O_RDONLY | os.O_CLOEXEC,)
_TRY: Final = fcntl.LOCK_EX | fcntl.LOCK_NB
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL if system.HAS_SEALS else 0

# One that a receiver reads, one that it still has, and two on the way.
_MOST_OF_AN_END: Final = 4
# Of this process, together: what was not used for the longest time is let go first.
_MOST_KEPT: Final = 16
_MOST_BYTES: Final = 32 << 20
_LARGEST_KEPT: Final = 16 << 20
# After so many writes of no more bytes it is mapped. To copy into a map takes two thirds of a
# write(2); to make one takes what that saves in four messages.
_WRITES: Final = 4
# After a receiver was found to have all of them, so many messages do not look.
_PAUSE: Final = 7


class MessageMemory(Spare):
    """A descriptor of the memory of one message, until that is sent."""

    __slots__ = ()


class KeptMemory:
    """A memfd for one message after the other."""

    __slots__ = ("__weakref__", "_file", "_map", "_path", "_writes", "_written", "size", "used")

    def __init__(self, file: Spare) -> None:
        self._file = [file]  # empty once it is let go, where somebody may be writing
        self._path = (_OWN % file.fileno(),)
        self.size = 0  # bytes
        self._written = 0  # bytes, without an error
        self._writes = 0  # since these are more
        self._map: mmap.mmap | None = None
        self.used = 0  # the greater the later

    @property
    def is_open(self) -> bool:
        return bool(self._file)

    def let_go(self) -> None:
        """Drops the memory: it is freed when no receiver has it."""
        self._file.clear()
        self._map = None

    def copy_of(self, pieces: Sequence[Piece], size: int) -> MessageMemory | None:
        """*pieces* in this memory, of which they take *size* bytes. The caller owns the result.

        None: it is in use, or let go. Raises: OSError of open(2), flock(2), pwrite(2).
        """
        numbers: list[int] = []
        made: list[MessageMemory] = []
        for file in self._file:  # it stays open while it is written to
            try:
                # Into lists at once, as in kernel/descriptor.py.
                numbers.extend(map(os.open, self._path, _READ))
                made.extend(map(MessageMemory, numbers))
                fcntl.flock(numbers[0], _TRY)
                self.used = next(_uses)
                mapped = self._map
                if mapped is not None and size <= len(mapped):
                    for start, buffer in pieces:
                        mapped[start : start + len(buffer)] = buffer
                else:
                    self._write(file, pieces, size)
            except BaseException as error:
                _close(numbers, made)
                if isinstance(error, BlockingIOError):
                    return None
                raise
            return made[0]
        return None

    def _write(self, file: Spare, pieces: Sequence[Piece], size: int) -> None:
        if size > self.size:
            self.size = size
            _trim()
        _write(file.fileno(), pieces)
        if size > self._written:
            self._written, self._writes, self._map = size, 0, None
        self._writes += 1
        if self._writes == _WRITES:
            # Of what was written all pages are there: write(2) says that there is no memory, and
            # who touches a map is killed.
            with suppress(OSError):
                self._map = shared_map(file.fileno(), self._written)
            if not self._file:  # it was let go in the meantime
                self._map = None


# All that this process keeps.
_kept: Final[set[weakref.ref[KeptMemory]]] = set()
_uses: Final = count(1)


class MemfdCache:
    """The memory of one sending end."""

    __slots__ = ("_kept", "_pause")

    def __init__(self) -> None:
        # Who was not used for the longest time comes first. Another tuple takes its place at each
        # change: where two threads come at once, what one of them keeps may be dropped.
        self._kept: tuple[KeptMemory, ...] = ()
        self._pause = 0

    def copy_of(self, pieces: Sequence[Piece], size: int) -> MessageMemory | None:
        """A copy of *pieces*, which take *size* bytes, in memory that is kept. The caller owns the
        result.

        None: all of it is in use, or a limit is reached.
        """
        if size > _LARGEST_KEPT:
            return None
        if self._pause:
            self._pause -= 1
            return None
        try:
            for kept in self._kept:
                memory = kept.copy_of(pieces, size)
                if memory is not None:
                    break
            else:
                if _too_many_wait():
                    return None
                kept = self._another()
                memory = kept.copy_of(pieces, size)
        except OSError:  # no descriptor, no memory, no /proc
            self._pause = _PAUSE
            return None
        if kept is not self._kept[-1]:
            others = (other for other in self._kept if other is not kept)
            self._kept = (*others, kept)[-_MOST_OF_AN_END:]
        if memory is not None:
            _unsent.add(weakref.ref(memory, _unsent.discard))
        return memory

    def _another(self) -> KeptMemory:
        """One that is new. Raises: OSError."""
        held = tuple(kept for kept in self._kept if kept.is_open)
        if len(held) >= _MOST_OF_AN_END:
            self._pause = _PAUSE
            held = held[1:]  # a receiver may keep it for ever
        kept = _new_kept()
        self._kept = (*held, kept)
        return kept


def _new_kept() -> KeptMemory:
    """Raises: OSError."""
    numbers: list[int] = []
    made: list[Spare] = []
    try:
        create_memfd_into(numbers, "fdshare-messages")
        made.extend(map(Spare, numbers))
        os.fchmod(numbers[0], 0o400)
        if _SEALS:
            fcntl.fcntl(numbers[0], fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        _close(numbers, made)
        raise
    kept = KeptMemory(made[0])
    _kept.add(weakref.ref(kept, _kept.discard))
    return kept


def _trim() -> None:
    """Lets go of what is beyond the limits of this process."""
    most = _share_of_descriptors(16, _MOST_KEPT)
    held = [kept for found in _kept.copy() if (kept := found()) is not None and kept.is_open]
    held.sort(key=attrgetter("used"), reverse=True)
    total = 0
    for index, kept in enumerate(held):
        total += kept.size
        if index >= most or total > _MOST_BYTES:
            kept.let_go()


# The memory that this process has and has not sent. Beyond so many, messages go through the socket
# as a whole: descriptors are the program's. What is dropped leaves the set by a call in C, which no
# signal's handler can interrupt.
_unsent: Final[set[weakref.ref[MessageMemory]]] = set()
_MOST_UNSENT: Final = 64


def new_copy_of(pieces: Sequence[Piece]) -> MessageMemory | None:
    """A copy of *pieces* in new memory, for this message alone. The caller owns the result.

    None: there is no memory, no descriptor, or too many wait to be sent.
    """
    if _too_many_wait():
        return None
    numbers: list[int] = []
    made: list[MessageMemory] = []
    try:
        create_memfd_into(numbers, "fdshare-message")
        made.extend(map(MessageMemory, numbers))
        _unsent.add(weakref.ref(made[0], _unsent.discard))
        _write(numbers[0], pieces)
    except BaseException as error:
        _close(numbers, made)
        if isinstance(error, OSError):
            return None
        raise
    return made[0]


def _too_many_wait() -> bool:
    return len(_unsent) >= _share_of_descriptors(4, _MOST_UNSENT)


def _share_of_descriptors(part: int, most: int) -> int:
    """A *part*-th of what this process may open, and *most* at most."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return most if limit == resource.RLIM_INFINITY else min(most, limit // part)


def _let_all_go() -> None:
    """In a forked child: they are the parent's."""
    _unsent.clear()
    for found in _kept.copy():
        kept = found()
        if kept is not None:
            kept.let_go()


os.register_at_fork(after_in_child=_let_all_go)


def _close(numbers: list[int], made: Sequence[Spare]) -> None:
    if made:
        made[0].close()
    elif numbers:
        os.close(numbers[0])


def _write(number: int, pieces: Sequence[Piece]) -> None:
    for offset, left in pieces:
        # write(2) takes 2 GiB at most.
        while (written := os.pwrite(number, left, offset)) < len(left):
            left, offset = memoryview(left)[written:], offset + written


def offsets(sizes: Sequence[int]) -> Iterator[int]:
    """Where areas of these *sizes* in bytes begin in a memfd."""
    offset = 0
    for size in sizes:
        yield offset
        offset += -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
