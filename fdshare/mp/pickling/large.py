"""What is large in a message: it lies in a memfd, whose descriptor travels beside the pickle.

That is what pickle protocol 5 can take out of a pickle, such as the numbers of an array, and a
pickle that is large by itself. A socket takes 200 KB at a time, copies them twice, and wakes both
processes for each piece. In a memfd they are written once, and the receiver maps them. Its map is
private, as all that a pickle brings: it may be written to, and nobody else sees that.

Each buffer has pages and a map of its own, which goes with the last view of it; that of a pickle
goes when it is loaded. memfd_cache.py has the memory.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from functools import partial
from pickle import PickleBuffer
from typing import Final

from fdshare.kernel.memfd import private_map
from fdshare.mp.pickling.memfd_cache import offsets

__all__ = ["BALLAST", "LARGE", "NEW", "NEW_PICKLE", "map_parts", "take_large"]

# Bytes from which on the memfd takes less time than the socket, if it was used before; if it is
# new; and if it is new and what is in it is copied once more (docs/performance.md).
LARGE: Final = 1 << 18
NEW: Final = 4 << 20
NEW_PICKLE: Final = 32 << 20
# Bytes that are sent beside the descriptor. A socket holds a dozen of such messages, where it would
# hold a hundred: the kernel limits how many descriptors a user has in flight.
BALLAST: Final = bytes(14 << 10)


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
    """The areas of these *sizes* in bytes, mapped. *fd* is borrowed for the call.

    Raises: OSError of mmap(2).
    """
    return list(map(partial(private_map, fd), offsets(sizes), sizes))
