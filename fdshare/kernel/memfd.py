"""memfd_create(2), and maps of a file."""

from __future__ import annotations

import errno
import mmap
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any, Final

__all__ = ["create_memfd", "create_memfd_into", "private_map", "shared_map"]

# <linux/memfd.h>, Linux 6.3: never executable, which vm.memfd_noexec may require.
_NOEXEC_SEAL: Final = 0x8
_MAP_FIXED: Final = 0x10  # <asm-generic/mman-common.h>; mmap does not name it
_POPULATE_WRITE: Final = 23  # madvise(2); mmap does not name it
_READ_WRITE: Final = mmap.PROT_READ | mmap.PROT_WRITE


def create_memfd(name: str) -> int:
    """The number of a new, empty memfd that can be sealed. The caller owns the result.

    Raises: OSError.
    """
    numbers: list[int] = []
    create_memfd_into(numbers, name)
    return numbers[0]


def create_memfd_into(numbers: list[int], name: str) -> None:
    """As `create_memfd`. The number is in *numbers*, whatever is raised: a signal's handler may
    raise after any call, and what that has returned is lost."""
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        numbers.extend(map(os.memfd_create, (name,), (flags | _NOEXEC_SEAL,)))
        return
    except OSError as error:
        if error.errno != errno.EINVAL:  # of a Linux before 6.3
            raise
    numbers.extend(map(os.memfd_create, (name,), (flags,)))


class _NoCtypesError(OSError):
    """This Python has no ctypes, or this process no descriptor free to import it with."""


def private_map(fd: int, offset: int, size: int) -> mmap.mmap:
    """*size* bytes of the file *fd* from *offset*, a multiple of the page size: writable, and what
    is written stays in this process.

    *fd* is borrowed for the call, and the map keeps no duplicate, as a map of Python's does: who
    keeps a thousand maps does not need a thousand descriptors. It is unmapped when nothing refers
    to it or to a view of it; the file must not shrink before. Raises: OSError of mmap(2).
    """
    try:
        return _map(fd, offset, size, mmap.MAP_PRIVATE)
    except _NoCtypesError:  # what was received would be lost
        return _copy(fd, offset, size)


def shared_map(fd: int, size: int) -> mmap.mmap:
    """As `private_map`, of the first *size* bytes, but what is written is written to the file. All
    of it can be written to without a page fault. Before Python 3.13 it needs ctypes, and the first
    call of a process a free descriptor to import it with: OSError."""
    mapping = _map(fd, 0, size, mmap.MAP_SHARED)
    with suppress(OSError):  # of a Linux before 5.14
        mapping.madvise(_POPULATE_WRITE)
    return mapping


def _map(fd: int, offset: int, size: int, flags: int) -> mmap.mmap:
    if sys.version_info >= (3, 13):
        if fd < 0:  # Python takes it for a map without a file
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return mmap.mmap(fd, size, flags, _READ_WRITE, offset=offset, trackfd=False)
    try:
        map_over, errno_of = _libc_mmap()
    except (ImportError, OSError) as error:
        raise _NoCtypesError from error
    mapping = _anonymous_map(size)
    if not map_over(mapping, size, flags, fd, offset):
        _broken.append(mapping)
        code = errno_of()
        raise OSError(code, os.strerror(code))
    return mapping


def _copy(fd: int, offset: int, size: int) -> mmap.mmap:
    """As `private_map`, but read, and not mapped."""
    copy = _anonymous_map(size)
    done = 0
    with memoryview(copy) as view:
        while done < size:  # a call reads 2 GiB at most
            count = os.preadv(fd, [view[done:]], offset + done)
            if not count:
                break
            done += count
    return copy


def _anonymous_map(size: int) -> mmap.mmap:
    return mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, _READ_WRITE)


# What mmap(2) may have unmapped before it failed: to unmap it again could hit another's map.
_broken: Final[list[mmap.mmap]] = []


@cache
def _libc_mmap() -> tuple[Callable[[mmap.mmap, int, int, int, int], bool], Callable[[], int]]:
    """What maps a file in the place of a map of Python's, which unmaps it in the end; and errno."""
    import ctypes  # not at import: libffi has a descriptor of its own

    call: Any = ctypes.CDLL(None, use_errno=True).mmap
    call.restype = ctypes.c_void_p
    call.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]

    def map_over(mapping: mmap.mmap, size: int, flags: int, fd: int, offset: int) -> bool:
        place = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        found = call(place, size, _READ_WRITE, flags | _MAP_FIXED, fd, offset)
        return bool(found == place)

    return map_over, ctypes.get_errno
