"""Addresses of UNIX sockets: pathnames, paths longer than `sun_path`, abstract names.

An address is a pathname, or `@name` for a name in Linux's abstract namespace (unix(7)). An abstract
name has no file mode: everybody in the network namespace can connect to it. A path that begins with
@ is written `./@name`.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, TypeAlias

from fdshare.errors import EndpointError, UnsupportedPlatform
from fdshare.kernel import system
from fdshare.kernel.credentials import platform

__all__ = ["SUN_PATH", "UnixAddress", "absolute", "file_type", "is_abstract", "sockaddr", "trouble"]

UnixAddress: TypeAlias = str | bytes | os.PathLike[str] | os.PathLike[bytes]

# A pathname needs one byte less, for the NUL.
SUN_PATH: Final = platform().sun_path

_KINDS: Final = {
    stat.S_IFREG: "a regular file",
    stat.S_IFDIR: "a directory",
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def is_abstract(address: str) -> bool:
    """True for `@name`."""
    return address.startswith("@")


def absolute(address: UnixAddress) -> str:
    """*address* as text, a pathname made absolute (so that chdir() does not change its meaning).

    Raises: EndpointError for an empty address, one with a NUL, or an abstract one that is too long;
    UnsupportedPlatform for an abstract one outside Linux.
    """
    text = os.fsdecode(address)
    if not text.strip("@"):
        raise EndpointError(text, "the address is empty; give a path, or @name", errno.EINVAL)
    if "\0" in text:
        raise EndpointError(
            text,
            "the address has a NUL byte; write an abstract name as @name",
            errno.EINVAL,
        )
    if not is_abstract(text):
        if os.path.isabs(text):
            return text
        # Not normpath(): after a symbolic link, `..` is another folder.
        parts = (part for part in text.split("/") if part not in ("", "."))
        return os.path.join(os.getcwd(), *parts)
    if not system.LINUX:
        raise UnsupportedPlatform("an abstract address", f"{system.NAME} has pathnames only")
    if len(os.fsencode(text)) > SUN_PATH:
        raise EndpointError(
            text, f"an abstract name has at most {SUN_PATH - 1} bytes", errno.ENAMETOOLONG
        )
    return text


@contextmanager
def sockaddr(address: str, *, exists: bool) -> Iterator[bytes]:
    """The argument of bind(2), or of connect(2) where the socket *exists*, for *address*.

    A path longer than `sun_path` goes through a descriptor of its directory, or of the socket
    itself, in /proc/self/fd (Linux); it is open as long as the context.
    *address* is absolute. Raises: EndpointError: it is too long even so; OSError of open(2).
    """
    raw = os.fsencode(address)
    if is_abstract(address):
        yield b"\0" + raw[1:]
        return
    if len(raw) < SUN_PATH:
        yield raw
        return
    if not system.LINUX:
        raise EndpointError(
            address,
            f"{len(raw)} bytes, a socket's path has at most {SUN_PATH - 1} here; "
            "choose a shorter one",
            errno.ENAMETOOLONG,
        )
    folder, name = os.path.split(raw)
    # "/proc/self/fd/" + up to 10 digits + "/": the rest is for the name.
    fits = len(name) < SUN_PATH - 25
    if not fits and not exists:
        raise EndpointError(
            address,
            f"its last part has {len(name)} bytes, at most {SUN_PATH - 26} can be bound "
            "at the end of a path this long; choose a shorter one",
            errno.ENAMETOOLONG,
        )
    flags = os.O_PATH | os.O_CLOEXEC | (os.O_DIRECTORY if fits else 0)
    fd = os.open(folder if fits else raw, flags)
    try:
        link = b"/proc/self/fd/%d" % fd
        yield link + b"/" + name if fits else link
    finally:
        os.close(fd)


def file_type(mode: int) -> str:
    """What an st_mode is, in words: "a regular file"."""
    return _KINDS.get(stat.S_IFMT(mode), "something else")


def trouble(address: str, error: OSError) -> EndpointError:
    """The EndpointError for *error*, from making a file at *address*: its cause and the remedy."""
    folder = os.path.dirname(address)
    code = error.errno or errno.EIO
    if code == errno.ENOENT:
        reason = f"the folder {folder} does not exist; create it: mkdir -p {folder}"
    elif code == errno.ENOTDIR:
        reason = f"{folder} is not a directory; choose a path in one"
    elif code in (errno.EACCES, errno.EPERM):
        reason = _who_may_write(folder)
    elif code == errno.EROFS:
        reason = f"{folder} is on a read-only file system; choose another, such as /run or /tmp"
    elif code == errno.ENAMETOOLONG:
        reason = "the path, or a part of it, is too long; choose a shorter one"
    else:
        reason = f"{error.strerror or error}"
    return EndpointError(address, reason, code)


def _who_may_write(folder: str) -> str:
    """Why this user cannot make a file in *folder*."""
    me = f"uid {os.geteuid()}"
    try:
        info = os.stat(folder)
    except OSError:
        return f"{me} may not look into {folder}; choose another folder, or run as its owner"
    return (
        f"{me} may not write to {folder} (owner uid {info.st_uid}, mode "
        f"{stat.S_IMODE(info.st_mode):04o}); choose another folder, or run as uid {info.st_uid}"
    )
