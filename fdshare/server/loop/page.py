"""Page: memory that the server writes and every follower reads, without a system call.

It is a memfd of 8-byte words in the byte order of the machine:

    word 0    the page's number, random; never 0
    word 1    how many words have been used
    word 2... slots (server/core/slots.py): a stamp each

Its size is sealed, so no reader can meet its end (SIGBUS). A client is given a second open file
description of it, which is open for reading only: the kernel refuses write(2), ftruncate(2) and a
writable mapping. Its mode is 0400, so that another user cannot open it anew through
/proc/self/fd; the server's own user and root can do that with all that a server has.

Nobody has it mapped for writing. The server writes with pwrite(2), which is one system call for the
change of a name that somebody follows; so a forked half inherits a number and nothing else. The
pages of a memfd are those of its mappings: what was written before an answer is read after it. A
reader compares a stamp with the one that it was told, and keeps none that it has read: so it does
no harm if a machine reads a word in two parts.
"""

from __future__ import annotations

import array
import os
import secrets
import struct
from typing import Final

from fdshare.errors import FdshareError
from fdshare.kernel.descriptor import Descriptor
from fdshare.kernel.shared_memory import SharedMemory
from fdshare.server.core.slots import FIRST, SHARED
from fdshare.server.loop.closing import Handle

__all__ = ["MemoryPage", "is_page", "new_page"]

_WORD: Final = struct.Struct("=Q")
_USED: Final = 1  # where it is written how many words have been used
# Memory is given page by page, when it is first written: this is 512 KiB at most.
_WORDS: Final = 1 << 16


def new_page() -> Descriptor | None:
    """An empty page. None where the kernel gives none: followers ask each time then. The caller
    owns the result."""
    try:
        with SharedMemory(_WORDS * _WORD.size, name="fdshare-page") as memory:
            os.fchmod(memory.fileno(), 0o400)
            header = _WORD.pack(secrets.randbits(63) | 1) + _WORD.pack(FIRST)
            os.pwrite(memory.fileno(), header, 0)
            return Descriptor.dup_of(memory)
    except (OSError, FdshareError):
        return None


def is_page(descriptor: Descriptor) -> bool:
    """Whether *descriptor*, which came from elsewhere, is a page that can be written."""
    try:
        with Descriptor.dup_of(descriptor) as copy, SharedMemory.adopt(copy) as memory:
            number = _WORD.unpack(os.pread(memory.fileno(), _WORD.size, 0))[0]
            os.pwrite(memory.fileno(), _WORD.pack(number), 0)
            return bool(number) and memory.size > FIRST * _WORD.size
    except (OSError, FdshareError, struct.error):
        return False


class MemoryPage:
    """A page, as `Page` describes it for the service."""

    def __init__(self, memfd: Descriptor) -> None:
        """*memfd* is borrowed for the life of this object. Raises: OSError: there is no /proc."""
        self._fd = memfd.fileno()
        self.size = os.fstat(self._fd).st_size // _WORD.size
        self.id, self._used = struct.unpack("=QQ", os.pread(self._fd, 2 * _WORD.size, 0))
        self.handle = Handle(os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_CLOEXEC))

    def write(self, slot: int, stamp: int) -> None:
        if slot >= self._used:  # first: a successor must know of it
            os.pwrite(self._fd, _WORD.pack(slot + 1), _USED * _WORD.size)
            self._used = slot + 1
        os.pwrite(self._fd, _WORD.pack(stamp), slot * _WORD.size)

    def write_all(self) -> int:
        count, start = self._used - SHARED, SHARED * _WORD.size
        words = array.array("Q", os.pread(self._fd, count * _WORD.size, start))
        stamp = max(words) + 1
        os.pwrite(self._fd, array.array("Q", [stamp]) * count, start)
        return stamp
