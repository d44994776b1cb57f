"""A file system that stops answering: FUSE, served by a process of its own.

It has one file. Until `hang` is called everything about it works; then calls of that kind wait
until the file system is closed, which aborts them. Or each close(2) of its file fails.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import socket
import stat
import struct
import tempfile
import threading
from collections import defaultdict
from collections.abc import Callable
from typing import Final

import pytest

from fdshare.kernel.descriptor import Descriptor

# Calls of the kernel, <linux/fuse.h>.
LOOKUP, GETATTR, OPEN, READ, WRITE, RELEASE, FLUSH = 1, 3, 14, 15, 16, 18, 25
INIT, OPENDIR = 26, 27
_SILENT: Final = (2, 36, 42)  # FORGET, INTERRUPT, BATCH_FORGET: nothing is answered
_NO_SUCH_CALL: Final = 38  # ENOSYS
_CLONE_NEWNS: Final = 0x20000
_PRIVATE: Final = (1 << 14) | (1 << 18)  # MS_REC | MS_PRIVATE
_HEADER: Final = struct.Struct("=IIQQIIII")
# Whether to hang a call or to say when one hangs; which call; the process whose calls they are, 0
# for all.
_ORDER: Final = struct.Struct("=?BI")
_ROOT: Final = 1

needs_fuse = pytest.mark.skipif(
    os.geteuid() != 0 or not os.path.exists("/dev/fuse"), reason="it takes root and /dev/fuse"
)


class HangingFileSystem:
    """Mounted for *uid*, in a mount namespace of its own, which `enter` enters. *close_error* is
    the errno of each close(2) of its file."""

    def __init__(self, uid: int, close_error: int = 0) -> None:
        self.folder = tempfile.mkdtemp(prefix="fds-")
        os.chown(self.folder, uid, uid)
        self._control, control = socket.socketpair()
        self._pid: int | None = os.fork()
        if not self._pid:
            try:
                _serve(self.folder, uid, control, close_error)
            finally:
                os._exit(1)
        control.close()
        assert self._control.recv(1)  # it is mounted

    def enter(self) -> None:
        """Makes this process see it. As root."""
        with open(f"/proc/{self._pid}/ns/mnt") as namespace:
            _checked(_libc.setns(namespace.fileno(), _CLONE_NEWNS))

    def open(self) -> int:
        """A descriptor of its file, in a process that has entered. The caller owns the result."""
        return os.open(f"{self.folder}/file", os.O_RDWR)

    def open_from_outside(self) -> int:
        """The same in a process of root's that has not entered. The caller owns the result."""
        return os.open(f"/proc/{self._pid}/root{self.folder}/file", os.O_RDWR)

    def hang(self, *calls: int, only: int = 0) -> None:
        """When this returns, these are not answered any more: those of the process *only*, or of
        all. From any process."""
        for call in calls:
            self._control.send(_ORDER.pack(True, call, only))
            assert self._control.recv(1)

    def wait(self, call: int) -> None:
        """Returns when a call of that kind hangs. From any process."""
        self._control.send(_ORDER.pack(False, call, 0))
        assert self._control.recv(1)

    def hold(self, say: Callable[[object], None]) -> int:
        """What `AsUser` can run: it has the file open, whose close hangs from then on."""
        file = self.open()
        self.hang(FLUSH)
        say("holds it")
        return file

    def close(self) -> None:
        """Ends it: what hangs fails."""
        if self._pid is not None:
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
            self._pid = None
            self._control.close()
            os.rmdir(self.folder)

    def __enter__(self) -> HangingFileSystem:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class ClosedWithError(Descriptor):
    """Of a file whose file system says when it is closed that what was written is lost."""

    __slots__ = ()

    def close(self) -> None:
        super().close()
        raise OSError(errno.EDQUOT, "Disk quota exceeded")


_libc = ctypes.CDLL(None, use_errno=True)


def _serve(folder: str, uid: int, control: socket.socket, close_error: int) -> None:
    _checked(_libc.unshare(_CLONE_NEWNS))
    _checked(_libc.mount(b"none", b"/", None, _PRIVATE, None))
    fuse = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={fuse},rootmode=40000,user_id={uid},group_id={uid},allow_other"
    _checked(_libc.mount(b"hanging", folder.encode(), b"fuse", 0, options.encode()))
    hang: dict[int, int] = {}
    caught: dict[int, threading.Event] = defaultdict(threading.Event)

    def obey() -> None:
        while order := control.recv(_ORDER.size):
            hangs, call, only = _ORDER.unpack(order)
            if hangs:
                caught[call].clear()
                hang[call] = only
            else:
                caught[call].wait()
            control.send(b"\0")

    threading.Thread(target=obey, daemon=True).start()
    control.send(b"\0")
    while True:
        request = os.read(fuse, 1 << 17)
        _, call, unique, node, _, _, thread, _ = _HEADER.unpack_from(request)
        if call in _SILENT:
            continue
        if call in hang and _is_of(thread, hang[call]):
            caught[call].set()
            continue
        body = _answer(call, node)
        error = -_NO_SUCH_CALL if body is None else 0
        if call == FLUSH and close_error:
            error = -close_error
        body = body or b""
        os.write(fuse, struct.pack("=IiQ", 16 + len(body), error, unique) + body)


def _is_of(thread: int, process: int) -> bool:
    return not process or os.path.exists(f"/proc/{process}/task/{thread}")


def _answer(call: int, node: int) -> bytes | None:
    if call == INIT:
        version, sizes = (7, 31, 65536, 0), (16, 12, 65536, 1, 0, 0, 0)
        return struct.pack("=IIIIHHIIHHI", *version, *sizes) + bytes(28)
    if call == LOOKUP:
        return struct.pack("=QQQQII", 2, 0, 0, 0, 0, 0) + _attributes(2)
    if call == GETATTR:
        return struct.pack("=QII", 0, 0, 0) + _attributes(node)
    if call in (OPEN, OPENDIR):
        return struct.pack("=QII", 1, 1, 0)  # without the page cache
    if call == READ:
        return b"x"
    return b"" if call in (RELEASE, FLUSH) else None


def _attributes(node: int) -> bytes:
    mode = stat.S_IFDIR | 0o777 if node == _ROOT else stat.S_IFREG | 0o666
    sizes, times = (4096, 8), (0, 0, 0, 0, 0, 0)
    return struct.pack("=QQQQQQIIIIIIIIII", node, *sizes, *times, mode, 1, 0, 0, 0, 4096, 0)


def _checked(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
