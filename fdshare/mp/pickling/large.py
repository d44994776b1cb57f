"""Large buffers of a pickle: they lie in a memfd, whose descriptor travels beside the pickle.

They are what pickle protocol 5 can take out of a pickle, such as the numbers of an array. A socket
takes 200 KB at a time, copies them twice, and wakes both processes for each piece. In a memfd they
are written once, and the receiver maps them. Its map is private, as all that a pickle brings: it
may be written to, and nobody else sees that.

Each buffer has pages and a map of its own, which are freed with the last view of it. The memfd has
no name, so a process that is killed leaves nothing behind. What a pickle copies in any case, such
as bytes, goes through the socket, which is as fast then (docs/performance.md).
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pickle import PickleBuffer
from typing import Final

from fdshare.kernel.descriptor import Spare
from fdshare.kernel.memfd import create_memfd_into, private_map

__all__ = ["BALLAST", "LARGE", "MessageMemory", "map_parts", "take_large"]

# Bytes from which on the memfd takes less time than the socket (docs/performance.md).
LARGE: Final = 4 << 20
# Bytes that are sent beside the descriptor. A socket holds a dozen of such messages, where it would
# hold a hundred: the kernel limits how many descriptors a user has in flight.
BALLAST: Final = bytes(14 << 10)

_MOST_AT_ONCE: Final = 1 << 30  # write(2) takes 2 GiB at most

# The memory that this process has and has not sent. Beyond so many, as at the descriptor limit,
# messages go through the socket as a whole: descriptors are the program's. What is dropped leaves
# the set by a call in C, which no signal's handler can interrupt.
_unsent: Final[set[weakref.ref[MessageMemory]]] = set()
_MOST_UNSENT: Final = 64
os.register_at_fork(after_in_child=_unsent.clear)  # that is the parent's to send


class MessageMemory(Spare):
    """A memfd with the large buffers of one message, until that is sent."""

    __slots__ = ()

    @classmethod
    def of(cls, buffers: Sequence[memoryview]) -> MessageMemory | None:
        """A copy of *buffers*, each at the beginning of a page. The caller owns the result.

        None: there is no memory for it, no descriptor, or too many are waiting to be sent.
        """
        if len(_unsent) >= _MOST_UNSENT:
            return None
        numbers: list[int] = []
        made: list[MessageMemory] = []
        try:
            create_memfd_into(numbers, "fdshare-message")
            made.extend(map(cls, numbers))
            _unsent.add(weakref.ref(made[0], _unsent.discard))
            for buffer, offset in zip(buffers, _offsets(map(len, buffers)), strict=True):
                made[0]._write(buffer, offset)
        except BaseException as error:
            if made:
                made[0].close()
            elif numbers:
                os.close(numbers[0])
            if isinstance(error, OSError):
                return None
            raise
        return made[0]

    def _write(self, view: memoryview, offset: int) -> None:
        while view:
            written = os.pwrite(self.fileno(), view[:_MOST_AT_ONCE], offset)
            view, offset = view[written:], offset + written


def take_large(taken: list[memoryview], buffer: PickleBuffer) -> bool:
    """A buffer_callback of pickle: a large *buffer* is added to *taken*. True: it is not large, and
    stays in the pickle."""
    try:
        view = buffer.raw()
    except BufferError:  # it has gaps
        return True
    if view.nbytes < LARGE:
        return True
    taken.append(view)
    return False


def map_parts(fd: int, sizes: Sequence[int]) -> list[mmap.mmap]:
    """The buffers of these *sizes* in bytes, mapped. *fd* is borrowed for the call.

    Raises: OSError of mmap(2).
    """
    return list(map(partial(private_map, fd), _offsets(sizes), sizes))


def _offsets(sizes: Iterable[int]) -> Iterator[int]:
    offset = 0
    for size in sizes:
        yield offset
        offset += -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
