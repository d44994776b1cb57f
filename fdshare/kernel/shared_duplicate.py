"""One duplicate of a descriptor for all in this process that keep the same open file description.

Thousands of messages with the same listener may wait to be sent: each keeps its descriptor, and all
of them together one.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Final, TypeAlias
from weakref import ref

from fdshare.errors import ClosedDescriptor
from fdshare.kernel.descriptor import Spare
from fdshare.kernel.open_file import same_here

__all__ = ["SharedDuplicate", "share"]

# How many duplicates of the same file, each of another description of it, are looked at. The kernel
# has one file for all of a kind of descriptors (eventfd, epoll, ...): to look at thousands of them
# takes longer than to have another duplicate.
_LOOKED_AT: Final = 256


class SharedDuplicate:
    """A duplicate, which is closed when the last reference to this object goes.

    It has no finaliser of its own: an object that is being finalised could still be found.
    """

    __slots__ = ("__weakref__", "_descriptor")

    def __init__(self, descriptor: Spare) -> None:
        self._descriptor = descriptor

    def fileno(self) -> int:
        """The descriptor's number, borrowed from this object."""
        return self._descriptor.fileno()


# Device and number of a file: the duplicates of its descriptions, the newest last. A change puts
# another tuple in the place of the old one: where two come at once, one of the two is not found
# later, and that is all.
_File: TypeAlias = tuple[int, int]
_held: Final[dict[_File, tuple[ref[SharedDuplicate], ...]]] = {}


def share(fd: int) -> SharedDuplicate:
    """A duplicate of *fd*, the same one for all that have one of this description.

    It is safe to close *fd* after this call; drop the result. Where the kernel does not tell which
    descriptors share a description (kcmp(2)), each has a duplicate of its own.

    Raises: ClosedDescriptor; OSError (EMFILE).
    """
    try:
        status = os.fstat(fd)
    except OSError as error:
        if error.errno == errno.EBADF:
            raise ClosedDescriptor(f"descriptor {fd} is not open") from None
        raise
    file = status.st_dev, status.st_ino
    for entry in _held.get(file, ())[: -_LOOKED_AT - 1 : -1]:
        shared = entry()
        if shared is not None and same_here(shared.fileno(), fd):
            return shared
    shared = SharedDuplicate(Spare.dup_of(fd))
    _held[file] = (*_held.get(file, ()), ref(shared, _forgetting(file)))
    return shared


def _forgetting(file: _File) -> Callable[[ref[SharedDuplicate]], None]:
    def forget(gone: ref[SharedDuplicate]) -> None:
        rest = tuple(entry for entry in _held.get(file, ()) if entry is not gone)
        if rest:
            _held[file] = rest
        else:
            _held.pop(file, None)

    return forget
