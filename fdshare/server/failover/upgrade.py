"""New code for a running keeper: it is tried first, and then replaces the old code by exec.

The table is passed in a memfd, and the descriptors are inherited by number. An upgrade can fail in
three places, and the old code goes on after each. In the trial, a child process, the new code must
be able to read the table. The exec itself may fail. And if the new code dies or hangs after the
exec, the old server, which still has everything, forks a keeper of the old code.
"""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterable
from typing import IO, Final

import msgspec

from fdshare.kernel.descriptor import Descriptor
from fdshare.kernel.endpoint import Listener
from fdshare.kernel.memfd import create_memfd
from fdshare.server import logs
from fdshare.server.core.image import Image, image_of, table_of
from fdshare.server.core.table import Table
from fdshare.server.failover.holdings import Holdings
from fdshare.server.interpreter import fresh_interpreter
from fdshare.server.loop.closing import Handle
from fdshare.server.loop.dying import has_ended, is_ending
from fdshare.server.loop.page import new_page
from fdshare.server.settings import Settings

__all__ = [
    "HANDOVER_VERSION",
    "Handover",
    "Trial",
    "adopt",
    "make_handover",
    "exec_new_code",
    "read_handover",
]

HANDOVER_VERSION: Final = 1
_NEW_CODE: Final = "fdshare.server.failover.new_code"
_TRIAL: Final = 20.0  # seconds for the trial
_END: Final = 1.0  # seconds for its process to end


class Handover(msgspec.Struct):
    """Everything that a keeper holds; descriptors by their numbers."""

    version: int
    settings: Settings
    epoch: str
    image: Image
    handles: list[int]  # what its record draws
    address: str
    inode: tuple[int, int] | None
    listener: int
    lock: int | None
    control: int | None
    journal: int
    server: int
    session: str = ""  # whose request asked for the upgrade
    id: int = 0
    fdstore: int | None = None
    dying: dict[int, str] = {}  # see Holdings
    page: int | None = None
    reloading: bool = False  # the server may not have heard of the last SIGHUP

    def numbers(self) -> list[int]:
        """Every descriptor that the new code inherits."""
        single = (self.listener, self.lock, self.control, self.journal, self.server, self.fdstore)
        return [*self.handles, *(fd for fd in (*single, self.page) if fd is not None)]

    def table(self) -> Table:
        """The table, with handles of the same numbers."""
        return table_of(self.image, list(map(Handle, self.handles)))


class Trial:
    """New code that reads the handover, in a child. It has ended when `fileno()` is readable, and
    is over when `is_over()`."""

    def __init__(self, handover: Handover, kept: Iterable[int]) -> None:
        """*kept*: what the child must have to the end. Everything else is closed before the new
        code runs, and a close that does not return would keep this process waiting, too.
        Raises: OSError, and what the handover cannot be encoded for."""
        with _memfd(handover) as file:
            self._output: IO[bytes] = open(create_memfd("fdshare-trial"), "w+b")
            try:
                command = fresh_interpreter(_NEW_CODE, f"try_table({file.fileno()})")
                passed = [fd for fd in (file.fileno(), handover.fdstore) if fd is not None]
                self._process = subprocess.Popen(
                    command,
                    pass_fds=[*passed, *kept],
                    stdin=subprocess.DEVNULL,
                    stdout=self._output,
                    stderr=self._output,
                )
                self.pidfd = Descriptor(os.pidfd_open(self._process.pid))
            except BaseException:
                self._output.close()
                raise

    limit = _TRIAL

    def abandon(self) -> None:
        """In a forked child: closes its copies; the trial is the parent's."""
        self.pidfd.close()
        self._forget()

    def fileno(self) -> int:
        return self.pidfd.fileno()

    def is_over(self) -> bool:
        """The new code has come to its end. The process may still hang in that of its own."""
        return is_ending(self.pidfd)

    def verdict(self) -> str:
        """Empty if the new code can read the handover, else why it cannot. A trial that is not over
        is killed. Its pidfd is the caller's."""
        hangs = not self.is_over()
        if hangs:
            self._process.kill()
        has_ended(self.pidfd, _END)
        status = self._process.poll()
        self._output.seek(0)
        said = self._output.read().decode(errors="replace").strip()
        self._forget()
        if hangs:
            return f"the new code said nothing for {_TRIAL:g} s"
        if status or (status is None and said):  # None: it hangs in its end
            return said.splitlines()[-1] if said else f"the new code ended with status {status}"
        return ""

    def _forget(self) -> None:
        self._output.close()
        self._process.returncode = 0  # else subprocess would wait for it in __del__


def exec_new_code(handover: Handover) -> None:
    """Runs the new code in this process; the pid and the descriptors stay. Does not return.
    Raises: OSError: exec failed; and what the handover cannot be encoded for. Nothing has changed
    then."""
    with _memfd(handover) as file:
        _set_inheritable((file.fileno(), *handover.numbers()), True)
        try:
            command = fresh_interpreter(_NEW_CODE, f"resume({file.fileno()})")
            logs.flush()
            os.execv(command[0], command)
        finally:
            _set_inheritable(handover.numbers(), False)


def read_handover(fd: int) -> Handover:
    """The handover in the memfd *fd*, which is closed. Raises: ValueError."""
    with open(fd, "rb") as file:
        file.seek(0)
        data = file.read()
    version = msgspec.msgpack.decode(data, type=_Version).version
    if version != HANDOVER_VERSION:
        raise ValueError(f"the handover has version {version}, this code reads {HANDOVER_VERSION}")
    handover: Handover = msgspec.msgpack.decode(data, type=Handover)
    return handover


def make_handover(
    holdings: Holdings, journal: socket.socket, server: Descriptor, session: str, id: int
) -> Handover:
    """What a keeper holds, and the request that asked for the upgrade, if there was one."""
    listener = holdings.listener
    image, handles = image_of(holdings.table)
    return Handover(
        version=HANDOVER_VERSION,
        settings=holdings.settings,
        epoch=holdings.epoch,
        image=image,
        handles=[handle.fd for handle in handles],
        address=listener.address,
        inode=listener.inode,
        listener=listener.fileno(),
        lock=listener.lock_fileno(),
        control=None if holdings.control is None else holdings.control.fileno(),
        journal=journal.fileno(),
        server=server.fileno(),
        session=session,
        id=id,
        fdstore=None if holdings.fdstore is None else holdings.fdstore.fileno(),
        dying=holdings.dying,
        page=None if holdings.page is None else holdings.page.fileno(),
    )


def adopt(handover: Handover) -> Holdings:
    """After the exec: what was inherited, as objects, and close-on-exec again. The caller owns the
    result, and `handover.journal` and `handover.server`."""
    _set_inheritable(handover.numbers(), False)
    lock = None if handover.lock is None else Descriptor(handover.lock)
    sock = socket.socket(fileno=handover.listener)
    listener = Listener(handover.address, sock, lock, handover.inode)
    control = None if handover.control is None else socket.socket(fileno=handover.control)
    fdstore = None if handover.fdstore is None else Descriptor(handover.fdstore)
    return Holdings(
        handover.settings,
        listener,
        handover.table(),
        handover.epoch,
        control,
        fdstore,
        dying=handover.dying,
        page=new_page() if handover.page is None else Descriptor(handover.page),
    )


class _Version(msgspec.Struct):
    version: int


def _memfd(handover: Handover) -> IO[bytes]:
    data = msgspec.msgpack.encode(handover)
    file = open(create_memfd("fdshare-handover"), "w+b")
    try:
        file.write(data)
        file.flush()
        file.seek(0)
    except BaseException:
        file.close()
        raise
    return file


def _set_inheritable(fds: Iterable[int], inheritable: bool) -> None:
    for fd in fds:
        os.set_inheritable(fd, inheritable)
