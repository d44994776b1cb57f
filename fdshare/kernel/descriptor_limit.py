"""How many descriptors a process may have open, and the error that says so."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, Literal, TypeAlias

from fdshare.errors import DescriptorLimit

__all__ = [
    "Whose",
    "as_limit",
    "descriptor_limit",
    "first_use",
    "is_descriptor_limit",
    "raise_descriptor_limit",
]

_ADVICE: Final = {
    "server": "unregister some or raise it",
    "sender": "that many descriptors of this user are in flight, sent and not yet received: "
    "let the receivers read, or raise it (ulimit -n)",
}


Whose: TypeAlias = Literal["client", "command", "receiver", "sender", "server"]


def is_descriptor_limit(error: OSError) -> bool:
    """True if the system call failed because this process, or this system, may open no more."""
    return error.errno in (errno.EMFILE, errno.ENFILE)


def descriptor_limit(code: int | None, whose: Whose) -> DescriptorLimit:
    """The error for *code*, an errno: EMFILE, ENFILE, or ETOOMANYREFS of a sender
    (too_many_unix_fds, net/unix/af_unix.c). The limit in it is this process's RLIMIT_NOFILE."""
    code = code or errno.EMFILE
    what = "fs.file-max" if code == errno.ENFILE else "RLIMIT_NOFILE"
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    advice = _ADVICE.get(whose, "")
    if whose == "sender" and code != errno.ETOOMANYREFS:
        advice = ""  # it has none free for a duplicate
    return DescriptorLimit(code, what, limit, None, whose, advice)


def as_limit(error: BaseException, whose: Whose = "sender") -> BaseException:
    """*error* of one that needed a descriptor, to be raised: a DescriptorLimit where it had none
    free."""
    if isinstance(error, OSError) and is_descriptor_limit(error):
        return descriptor_limit(error.errno, whose)
    if isinstance(error, ImportError) and (full := _full()) is not None:
        return descriptor_limit(full.errno, whose)
    return error


def _full() -> OSError | None:
    """Why no descriptor is free; None if one is. Where a shared library of a module cannot be
    opened, the ImportError has no errno."""
    try:
        os.close(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        return error if is_descriptor_limit(error) else None
    return None


@contextmanager
def first_use(whose: Whose = "client") -> Iterator[None]:
    """For an import of what few programs use.

    Raises: DescriptorLimit: none is free to read the module's file with.
    """
    try:
        yield
    except (ImportError, OSError) as error:
        raise as_limit(error, whose) from None


def raise_descriptor_limit() -> int:
    """Raises the soft RLIMIT_NOFILE to the hard one; the limit that applies then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (ValueError, OSError):
            return soft
    return hard
