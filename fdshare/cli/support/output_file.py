"""Where the output of a program in the background goes: a file of its own.

Not the streams of who started it: `pid=$(fdshare run --detach ...)`, ssh and every CI would wait
for the end of the program.
"""

from __future__ import annotations

import os
import stat
import urllib.parse
from typing import Final, Self

from fdshare.client.default_path import own_folder
from fdshare.errors import EndpointError
from fdshare.kernel.descriptor import Descriptor
from fdshare.kernel.unix_address import absolute, is_abstract

__all__ = ["OutputFile"]

_LAST_LINES: Final = 10
_LAST_BYTES: Final = 4096


class OutputFile:
    """An open file to append to, and what was written to it since it was opened."""

    def __init__(self, path: str, *, flags: int = 0) -> None:
        """*flags* of open(2), beside its own. Raises: OSError."""
        self.path = path
        flags |= os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self.descriptor = Descriptor(os.open(path, flags, 0o600))
        self._start = os.fstat(self.descriptor.fileno()).st_size

    @classmethod
    def beside(cls, address: str, name: str) -> OutputFile:
        """PATH.NAME.log beside the socket of the server; in this user's own folder under /tmp where
        that cannot be written. The caller owns the result. Raises: OSError, EndpointError."""
        file = urllib.parse.quote(name, safe=" ")
        folder = "" if is_abstract(address) else os.path.dirname(absolute(address))
        if folder and os.access(folder, os.W_OK):
            path = f"{absolute(address)}.{file}.log"
        else:
            path = os.path.join(own_folder(create=True), f"{file}.log")
        made = cls(path, flags=os.O_NOFOLLOW)
        found = os.fstat(made.descriptor.fileno())
        # In a folder that others may write, it could be theirs.
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
            made.close()
            raise EndpointError(path, "it is not a file of this user; give --output FILE")
        return made

    def last_lines(self) -> list[str]:
        """The last lines that were written since it was opened; none of what is no file."""
        fd = self.descriptor.fileno()
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return []
        at = max(self._start, os.fstat(fd).st_size - _LAST_BYTES)
        return os.pread(fd, _LAST_BYTES, at).decode(errors="replace").splitlines()[-_LAST_LINES:]

    def close(self) -> None:
        """Closes it; a program that got it goes on writing."""
        self.descriptor.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
