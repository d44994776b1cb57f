"""Descriptor: owns one open file descriptor and closes it exactly once.

Nothing in a descriptor's number says who closes it. So everything in fdshare that owns one has a
`Descriptor`. What only uses one during a call takes anything with `fileno()`, or a bare int, and
its docstring says so.
"""

from __future__ import annotations

import errno
import fcntl
import io
import os
import socket
import warnings
from collections.abc import Callable
from typing import IO, Any, Final, Protocol, Self, TypeVar, runtime_checkable

from fdshare.errors import ClosedDescriptor, UnsupportedKind
from fdshare.kernel.plain_socket import socket_of
from fdshare.printable import printable

__all__ = ["Descriptor", "HasFileno", "Spare", "borrow"]

T = TypeVar("T")

_DETACHED: Final[list[int]] = []  # Descriptor._number of those that are detached

_LARGEST: Final = 2**31 - 1  # a number is an int of C

_DUPLICATE: Final = (fcntl.F_DUPFD_CLOEXEC,)
_LOWEST: Final = (0,)


@runtime_checkable
class HasFileno(Protocol):
    """Anything that knows its descriptor: a socket, a file, a Connection, a Descriptor."""

    def fileno(self) -> int:
        """The number of the descriptor, which stays the object's."""


def borrow(obj: HasFileno | int) -> int:
    """The descriptor number of *obj*, without taking it over. *obj* must outlive the use.

    Raises:
        ClosedDescriptor: *obj* is closed, or a number that no descriptor can have.
        UnsupportedKind: *obj* has no `fileno()`, or one that returns no number.

    >>> with open(os.devnull) as file:
    ...     borrow(file) == file.fileno()
    True
    """
    if isinstance(obj, int):
        if isinstance(obj, bool) or not 0 <= obj <= _LARGEST:
            raise ClosedDescriptor(f"{obj!r} is not a descriptor")
        return obj
    try:
        fd = obj.fileno()
    except AttributeError:
        raise UnsupportedKind(type(obj).__qualname__, "it has no fileno()") from None
    except io.UnsupportedOperation:
        raise UnsupportedKind(type(obj).__qualname__, "it is a file without a descriptor") from None
    except ClosedDescriptor:
        raise
    except (ValueError, OSError) as error:  # "I/O operation on closed file", "handle is closed"
        raise ClosedDescriptor(f"{type(obj).__qualname__}: {error}") from None
    if not isinstance(fd, int):
        raise UnsupportedKind(type(obj).__qualname__, f"its fileno() returns {fd!r}")
    if fd < 0:  # what a closed socket answers
        raise ClosedDescriptor(f"the {type(obj).__qualname__} is closed")
    if fd > _LARGEST:
        raise ClosedDescriptor(f"{fd} is not a descriptor")
    return fd


class Descriptor:
    """Owns one open descriptor, in one of three states: open, closed, detached.

    `Descriptor(fd)` takes over *fd*, which must be open; `Descriptor.dup_of(obj)` makes a copy and
    does not touch *obj*. One that is dropped without close() is closed with a ResourceWarning. Of
    several threads that close or detach it one does so. A thread must not close it while another
    uses it: the number may be another descriptor by then.

    >>> with open(os.devnull) as file:
    ...     descriptor = Descriptor.dup_of(file)
    >>> with descriptor.open() as again:  # owns it now
    ...     again.read()
    ''
    """

    # In a list that is empty once it is closed or detached: to delete an item is one step, with the
    # GIL off as with it, so that only one of several threads closes it.
    __slots__ = ("__weakref__", "_number")

    def __init__(self, fd: int) -> None:
        self._number = [fd]

    @classmethod
    def dup_of(cls, obj: HasFileno | int) -> Self:
        """A new, close-on-exec descriptor for the open file description of *obj*.

        It is safe to close *obj* after this call. The caller owns the result.
        Raises: ClosedDescriptor, UnsupportedKind (see `borrow`), OSError (EMFILE).
        """
        fd = borrow(obj)
        numbers: list[int] = []
        made: list[Self] = []
        try:
            # Into lists at once: a signal's handler may raise after any call, and what that has
            # returned is lost.
            numbers.extend(map(fcntl.fcntl, (fd,), _DUPLICATE, _LOWEST))
            made.extend(map(cls, numbers))
        except BaseException as error:
            if made:
                made[0].close()
            elif numbers:
                os.close(numbers[0])
            if isinstance(error, OSError) and error.errno == errno.EBADF:
                raise ClosedDescriptor(f"descriptor {fd} is not open") from None
            raise
        return made[0]

    def fileno(self) -> int:
        """The descriptor number; still owned by this object."""
        try:
            return self._number[0]
        except IndexError:
            raise ClosedDescriptor(f"the descriptor is {self._end()}") from None

    @property
    def closed(self) -> bool:
        """True once closed or detached."""
        return not self._number

    def close(self) -> None:
        """Closes it; does nothing if it is closed or detached."""
        number = self._number
        try:
            fd = number[0]
            del number[0]  # no signal's handler comes between this and close(2)
        except IndexError:  # perhaps another thread was faster
            return
        # close(2) on Linux frees the number whatever it returns: a second try could close another
        # descriptor.
        os.close(fd)

    def detach(self) -> int:
        """The number, which the caller owns now; this object is detached."""
        number = self._number
        try:
            fd = number[0]
            del number[0]
        except IndexError:
            return self.fileno()  # raises, and says which of both it is
        self._number = _DETACHED
        return fd

    def hand_to(self, make: Callable[[int], T]) -> T:
        """What *make* makes of the number, which is that object's then. The caller owns the result.

        If *make* raises, the number must still be open, and stays this object's.
        """
        made: list[T] = []
        try:
            made.extend(map(make, (self.fileno(),)))
        finally:
            if made:
                self._number = _DETACHED
        return made[0]

    def dup(self) -> Descriptor:
        """A second descriptor of the same open file description. The caller owns the result."""
        return Descriptor.dup_of(self)

    def open(self, mode: str = "r", **options: Any) -> IO[Any]:
        """A file object that takes the descriptor over; *options* as for builtin `open`.

        The caller owns the result; this object is detached, unless open() raises. With
        closefd=False this object stays the owner.
        """
        # Builtin open() closes the number where it fails late (an unknown encoding), and not where
        # it fails early (a bad mode): so it fails, if at all, on a file that closes nothing.
        file: IO[Any] = open(self.fileno(), mode, **{**options, "closefd": False})
        if options.get("closefd", True):
            file.close()
            file = open(self.detach(), mode, **options)
        return file

    def socket(self) -> socket.socket:
        """A socket that takes the descriptor over; the kernel says its family, type and protocol.

        Whether it blocks is left as it is, whatever `socket.setdefaulttimeout()` says.

        The caller owns the result; this object is detached. Raises: OSError ENOTSOCK: it is not a
        socket, and is still this object's.
        """
        return self.hand_to(socket_of)

    def __enter__(self) -> Descriptor:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Descriptor {self._what()}>"

    def _what(self) -> str:
        """Its number, and what the kernel says that it is, where there is /proc; or its end."""
        try:
            fd = self._number[0]
        except IndexError:
            return self._end()
        try:
            return printable(f"fd={fd} {os.readlink(f'/proc/self/fd/{fd}')}")
        except OSError:
            return f"fd={fd}"

    def _end(self) -> str:
        return "detached" if self._number is _DETACHED else "closed"

    def __reduce__(self) -> str:
        # The number means nothing in another process; the reducers of fdshare.mp send a copy.
        raise TypeError(
            "a Descriptor cannot be pickled by itself: call fdshare.install(), or send it through "
            "a channel of fdshare.get_context()"
        )

    def __del__(
        self,
        # At the end of the interpreter this module may have lost its names.
        _close: Callable[[int], None] = os.close,
        _warn: Callable[..., None] = warnings.warn,
    ) -> None:
        # Not getattr, which is slower: this runs for each descriptor, detached ones too.
        try:
            number = self._number
        except AttributeError:  # __init__ was never reached
            return
        if number:
            fd = number[0]
            del number[0]
            _close(fd)
            _warn(f"descriptor {fd} was never closed", ResourceWarning, stacklevel=2)


class Spare(Descriptor):
    """A Descriptor that closes without a warning when it is dropped.

    For an owner that promises to close what it holds when it is dropped itself: of the two, the
    collector may finalise either first.
    """

    __slots__ = ()

    def __del__(self, _close: Callable[[int], None] = os.close) -> None:  # type: ignore[override]
        number = getattr(self, "_number", None)
        if number:
            fd = number[0]
            del number[0]
            _close(fd)
