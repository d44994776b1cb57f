"""SharedMemory: memory that is sent as a descriptor, made with memfd_create(2) and its seals.

Its size is sealed from the start: nobody can shrink it while others read it, which would end them
with SIGBUS. After `seal()` nobody can write to it any more. Seals belong to the memory and not to
the descriptor (fcntl(2), "File Sealing"), so a receiver need not trust the sender: it asks the
kernel before it maps anything.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import sys
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from fdshare.errors import (
    InvalidArgument,
    KindMismatch,
    MemoryBusy,
    UnsupportedPlatform,
)
from fdshare.kernel import system
from fdshare.kernel.descriptor import Descriptor, Spare
from fdshare.kernel.memfd import create_memfd

if TYPE_CHECKING:
    import numpy

__all__ = ["ArrayPlace", "SharedMemory", "array_place", "is_sealed", "shared_copy"]

# <linux/fcntl.h>; Python names F_SEAL_FUTURE_WRITE (Linux 5.1) from 3.14 on.
_FUTURE_WRITE: Final = 0x10


class SharedMemory:
    """A block of *size* bytes, all zero, that other processes map when they receive it.

    Register it, send it through a queue, or pass its descriptor: what arrives is the same memory,
    not a copy. Both sides may write until somebody calls `seal()`; there is no lock in it. Threads
    may share the object; none may close it while another uses it.

    The memory exists as long as anything refers to it: this object, a view of it, an array in it,
    in any process, or a name it is registered under. `close()` only closes this object's descriptor
    early; views stay valid. docs/compat.md says what to write for each line of a program that uses
    `multiprocessing.shared_memory`. The caller owns the result. Raises: UnsupportedPlatform;
    InvalidArgument; OSError of memfd_create(2) and ftruncate(2).

    >>> receiver, sender = fdshare.get_context().Pipe()
    >>> with receiver, sender, fdshare.SharedMemory(4096) as memory:
    ...     sender.send(memory)
    ...     with receiver.recv() as again:
    ...         again.buf[:5] = b"hello"
    ...         bytes(memory.buf[:5])
    b'hello'
    """

    __slots__ = ("__weakref__", "_descriptor", "_map", "size")

    def __init__(self, size: int, *, name: str = "fdshare") -> None:
        if not 0 <= size <= sys.maxsize:
            raise InvalidArgument("size", f"{size} bytes")
        self._map: _Map | None = None
        self.size = size
        self._descriptor = _create(name)
        try:
            # Memory is given page by page, when it is first touched.
            os.ftruncate(self._descriptor.fileno(), size)
            _add_seals(self._descriptor, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        except BaseException:
            self._descriptor.close()
            raise

    @classmethod
    def from_bytes(cls, data: Any, *, name: str = "fdshare") -> SharedMemory:
        """A sealed block with a copy of *data*: bytes, or any other contiguous buffer.

        It is safe to change *data* after this call. The caller owns the result.
        Raises: as the constructor; TypeError: no buffer, or one with gaps.
        """
        with memoryview(data) as given, given.cast("B") as view:
            memory = cls(len(view), name=name)
            at = 0
            while at < len(view):  # write(2) takes 2 GiB at most
                at += os.write(memory.fileno(), view[at : at + (1 << 30)])
        memory.seal()
        return memory

    @classmethod
    def adopt(
        cls, descriptor: Descriptor, *, size: int | None = None, sealed: bool = False
    ) -> SharedMemory:
        """The block behind a *descriptor* that came from elsewhere, which is taken over.

        Nothing is mapped before the kernel has said that the size is sealed, is *size* where that
        is given, and that nobody can write where *sealed*. The caller owns the result.
        Raises: KindMismatch (*descriptor* is still the caller's); UnsupportedPlatform.
        """
        _platform()
        fd = descriptor.fileno()
        try:
            seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
            access = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
        except OSError:
            raise KindMismatch("memory", "it has no seals") from None
        # hugetlbfs_statfs(), fs/hugetlbfs/inode.c. A page that is given back by fallocate(2)
        # does not come back where no huge page is free: SIGBUS, whatever the seals say.
        if os.fstatvfs(fd).f_bsize != mmap.PAGESIZE:
            raise KindMismatch("memory", "it lies in huge pages, which can vanish while it is read")
        if not seals & fcntl.F_SEAL_SHRINK:
            raise KindMismatch("memory", "it could shrink while it is read: its size is not sealed")
        if sealed and not seals & fcntl.F_SEAL_WRITE:
            raise KindMismatch("memory", "the kind says sealed, but somebody can still write")
        if access == os.O_WRONLY:
            raise KindMismatch("memory", "it is open for writing only, and cannot be mapped")
        found = os.fstat(fd).st_size
        if size is not None and size != found:
            raise KindMismatch("memory", f"it has {found} bytes, the sender said {size}")
        memory = cls.__new__(cls)
        memory._map = None
        memory.size = found
        memory._descriptor = descriptor.hand_to(Spare)
        return memory

    def fileno(self) -> int:
        """The descriptor's number; still owned by this object. Raises: ClosedDescriptor."""
        return self._descriptor.fileno()

    @property
    def closed(self) -> bool:
        """True after close()."""
        return self._descriptor.closed

    @property
    def sealed(self) -> bool:
        """True if nobody, in any process, can change the contents any more."""
        return is_sealed(self.fileno())

    @property
    def readonly(self) -> bool:
        """True if `buf` cannot be written to; others may still write unless it is `sealed`."""
        return self.buf.readonly

    @property
    def buf(self) -> memoryview:
        """The contents, *size* bytes; mapped at the first use, writable unless sealed.

        It stays valid after close(). Raises: ClosedDescriptor; OSError of mmap(2).
        """
        self.fileno()
        if self._map is None:
            if not self.size:  # mmap(2) maps no empty block
                return memoryview(b"" if self.sealed else bytearray())
            self._map = _Map.of(self._descriptor, self.size)
        return memoryview(self._map)

    def seal(self, *, keep_writing: bool = False) -> None:
        """Ends all writing, in every process and for ever.

        With *keep_writing* the views that are mapped now stay writable. Without it no writable view
        may be left anywhere: release memoryviews and drop arrays of this object first, and seal
        before others have mapped it. Does nothing if it is sealed.
        Raises: MemoryBusy: somebody can still write, and nothing has changed.
        """
        if self.sealed:
            return
        if keep_writing:
            self.buf.release()  # mapped now; later it could not be any more
            _add_seals(self._descriptor, _FUTURE_WRITE)
            return
        if self._map is not None:
            try:
                self._map.close()
            except BufferError:
                raise MemoryBusy(
                    "this process has views of it: release memoryviews and drop arrays first, or "
                    "seal(keep_writing=True), which leaves those writable"
                ) from None
            self._map = None
        try:
            _add_seals(self._descriptor, fcntl.F_SEAL_WRITE)
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise MemoryBusy("another process has it mapped for writing") from None
            raise

    def as_array(
        self,
        dtype: Any = "uint8",
        shape: int | tuple[int, ...] | None = None,
        *,
        offset: int = 0,
        strides: tuple[int, ...] | None = None,
    ) -> numpy.ndarray[Any, Any]:
        """A numpy array that lies in this memory: no copy, read-only where `buf` is.

        Without *shape* it has as many items as fit after *offset* (bytes). It keeps the memory
        alive, and can itself be registered or sent. Raises: InvalidArgument: it does not fit, or
        *dtype* holds Python objects, which are pointers.
        """
        import numpy

        kind = numpy.dtype(dtype)
        if kind.hasobject:
            raise InvalidArgument("dtype", f"{kind} holds Python objects, which cannot be shared")
        if not 0 <= offset <= self.size:
            raise InvalidArgument("offset", f"{offset} is not in a block of {self.size} bytes")
        if shape is None:
            shape = ((self.size - offset) // max(kind.itemsize, 1),)
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        if any(length < 0 for length in shape):
            raise InvalidArgument("shape", f"{shape} has a negative length")
        try:
            return numpy.ndarray(shape, kind, self.buf, offset, strides)
        except (ValueError, TypeError) as error:
            raise InvalidArgument("shape", f"{shape} of {kind} at {offset}: {error}") from None

    def close(self) -> None:
        """Closes the descriptor; the memory is unmapped when its last view is gone."""
        self._map = None
        self._descriptor.close()

    def __len__(self) -> int:
        return self.size

    def __enter__(self) -> SharedMemory:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"fd={self.fileno()}"
        return f"<SharedMemory {self.size} bytes {state}>"

    def __reduce__(self) -> str:
        raise TypeError(
            "SharedMemory cannot be pickled by itself: call fdshare.install(), or send it through "
            "a channel of fdshare.get_context()"
        )


class ArrayPlace(NamedTuple):
    """Where an array lies: *fd* (borrowed from the array), and *offset* bytes into its block."""

    fd: int
    size: int
    offset: int


def array_place(array: Any) -> ArrayPlace | None:
    """The shared memory under a numpy array, or under what it is a view of; None for any other.

    Raises: ClosedDescriptor: its SharedMemory was closed.
    """
    base = array
    while base is not None and not isinstance(base, _Map):
        # numpy keeps the memoryview that it was given, or what is under it.
        base = base.obj if isinstance(base, memoryview) else getattr(base, "base", None)
    if base is None:
        return None
    return ArrayPlace(base.descriptor.fileno(), len(base), _address(array) - _start(base))


def is_sealed(fd: int) -> bool:
    """True if nobody can change the contents any more. *fd* is borrowed for the call."""
    return bool(fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_WRITE)


def _address(array: Any) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


def _start(mapping: _Map) -> int:
    import numpy

    return _address(numpy.frombuffer(mapping, "uint8"))


def shared_copy(array: Any) -> numpy.ndarray[Any, Any]:
    """A read-only copy of a numpy array in sealed memory of its own, to be sent uncopied.

    It is safe to change *array* after this call. Raises: as `SharedMemory` and `as_array`.

    >>> numpy = importlib.import_module("numpy")
    >>> copy = fdshare.shared_copy(numpy.arange(4))
    >>> copy.sum() == 6 and not copy.flags.writeable
    True
    """
    import numpy

    given = numpy.asarray(array)
    if given.nbytes and given.flags.c_contiguous and not given.dtype.hasobject:
        # write(2) takes half the time of a map, which faults for each page.
        memory = SharedMemory.from_bytes(given.reshape(-1).view("uint8"))
        return memory.as_array(given.dtype, given.shape)
    memory = SharedMemory(given.nbytes)
    target = memory.as_array(given.dtype, given.shape)
    target[...] = given
    del target
    memory.seal()
    return memory.as_array(given.dtype, given.shape)


class _Map(mmap.mmap):
    """A mapping that keeps the descriptor: an array may outlive the SharedMemory it was made by."""

    descriptor: Spare

    @classmethod
    def of(cls, descriptor: Spare, size: int) -> _Map:
        """The whole block, writable if the seals and the descriptor allow it."""
        seals = _seals(descriptor)
        access = fcntl.fcntl(descriptor.fileno(), fcntl.F_GETFL) & os.O_ACCMODE
        flags, prot = mmap.MAP_SHARED, mmap.PROT_READ
        if seals & fcntl.F_SEAL_WRITE:
            # Before Linux 6.7 a write-sealed memfd could not be mapped shared, not even to be read.
            flags = mmap.MAP_PRIVATE
        elif access == os.O_RDWR and not seals & _FUTURE_WRITE:
            prot |= mmap.PROT_WRITE
        # Or mmap keeps a duplicate of the descriptor, which nobody needs.
        options: dict[str, Any] = {"trackfd": False} if sys.version_info >= (3, 13) else {}
        mapping = cls(descriptor.fileno(), size, flags=flags, prot=prot, **options)
        mapping.descriptor = descriptor
        return mapping


def _create(name: str) -> Spare:
    """A new memfd. Raises: UnsupportedPlatform; OSError."""
    _platform()
    return Spare(create_memfd(name))


def _platform() -> None:
    if not system.HAS_SEALS:
        raise UnsupportedPlatform("SharedMemory", f"{system.NAME} has no memfd_create with seals")


def _seals(descriptor: Descriptor) -> int:
    return fcntl.fcntl(descriptor.fileno(), fcntl.F_GET_SEALS)


def _add_seals(descriptor: Descriptor, seals: int) -> None:
    fcntl.fcntl(descriptor.fileno(), fcntl.F_ADD_SEALS, seals)
