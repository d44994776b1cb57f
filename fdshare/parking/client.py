"""The private server of a process tree, as its processes see it: an address, and a way to start it.

The address is made up by whoever needs one first; children inherit it, or learn it from what they
are sent. Who finds nobody there binds it and has a server exec'd: of two that try at once bind(2)
lets one through, and the other one's connect(2) waits in the same backlog. The server is no child
of anybody: not of multiprocessing, whose daemons may have none, and not for wait(2).

parking/server.py is what runs there, and says what is sent.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Sequence
from typing import Final

from fdshare.errors import (
    AddressInUse,
    AlreadyTaken,
    DescriptorLimit,
    NoServer,
    ServerGone,
    ServerTimeout,
    UnsupportedPlatform,
    UntrustedServer,
)
from fdshare.kernel.ancillary import MAX_DESCRIPTORS, peek_descriptors, send_message
from fdshare.kernel.credentials import peer_credentials
from fdshare.kernel.descriptor import Descriptor
from fdshare.kernel.endpoint import connect, listen
from fdshare.parking.server import CREDIT, FULL, KEY, LOOKS, PUT

__all__ = ["PrivateServer", "new_address"]

_PREFIX: Final = "fdshare-private-"
_TIMEOUT: Final = 30  # seconds that the server gets to answer; its start is in the first answer
_TIMEVAL: Final = struct.pack("@ll", _TIMEOUT, 0)
_ATTEMPTS: Final = 4  # a server may end as we come to it
_IDLE: Final = 4  # connections kept
_ANSWER: Final = 16  # bytes, more than any answer has
_PAUSE: Final = 0.005  # seconds, before another try
_TRIES_IN_FLIGHT: Final = 500
_UNKNOWN: Final = b"R" + bytes(KEY)  # a request for a key that nobody has


def new_address() -> str:
    """An address that nobody can guess: abstract on Linux, where no file has to be removed when the
    server is killed; elsewhere a path in a new folder of ours."""
    if sys.platform == "linux":
        return f"@{_PREFIX}{os.urandom(16).hex()}"
    return os.path.join(tempfile.mkdtemp(prefix=_PREFIX), "sock")


class _Line:
    """One connection, and the hatch beside it, through which as many descriptors as its *credit*
    says may be put without waking anybody."""

    __slots__ = ("credit", "hatch", "sock")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.hatch: socket.socket | None = None
        self.credit = 0

    def close(self) -> None:
        self.sock.close()
        if self.hatch is not None:
            self.hatch.close()

    def open_hatch(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.hatch = ours
        with theirs:
            send_message(self.sock, (b"L",), [theirs.fileno()])
        self.sock.recv(_ANSWER)


class PrivateServer:
    """The server at *address*, started when it is needed. Thread-safe, fork-safe."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._renew()
        _servers.add(self)

    def _renew(self) -> list[_Line]:
        """As new; returns the connections that it had."""
        former = [*self._idle, *self._unread.values()] if hasattr(self, "_idle") else []
        # Appended to and popped from by many threads, either in one step.
        self._idle: list[_Line] = []
        self._unread: dict[bytes, _Line] = {}
        return former

    def check(self) -> None:
        """Makes sure that it runs and is ours. Raises: UntrustedServer, UnsupportedPlatform."""
        self._give_back(self._borrow(start=True))

    def put(self, key: bytes, fds: Sequence[int], ttl: float, uses: int) -> None:
        """Copies of *fds* (1 to 253) are its own, or on their way to it, when this returns, and
        will be for *ttl* seconds.

        *fds* are borrowed for the call. Raises: DescriptorLimit: the server's, or of descriptors in
        flight; ServerGone, ServerTimeout; OSError of sendmsg(2).
        """
        packet = b"P" + key + PUT.pack(ttl, uses)
        for _ in range(_ATTEMPTS):
            line = self._borrow(start=True)
            try:
                if len(fds) <= line.credit and ttl > LOOKS and self._put_aside(line, packet, fds):
                    return
                self._send(line, packet, fds)
                answer = line.sock.recv(_ANSWER)
            except OSError as error:
                answer = self._no_answer(line, error)
            if self._has_put(line, answer):
                return
        raise ServerGone(self.address, "it ended again and again")

    def _put_aside(self, line: _Line, packet: bytes, fds: Sequence[int]) -> bool:
        """Puts it through the hatch, where the server finds it when somebody asks for it."""
        if line.hatch is None:
            line.open_hatch()
        assert line.hatch is not None
        try:
            send_message(line.hatch, (packet,), fds)
        except DescriptorLimit:
            return False  # too many are in flight; put openly the server makes room for it
        line.credit -= len(fds)
        self._give_back(line)
        return True

    def _send(self, line: _Line, packet: bytes, fds: Sequence[int]) -> None:
        """Raises: DescriptorLimit: too many descriptors of this user stay in flight."""
        for _ in range(_TRIES_IN_FLIGHT):
            try:
                send_message(line.sock, (packet,), fds)
                return
            except DescriptorLimit:
                # Asked for what it does not have, the server takes in all that waits in hatches.
                line.sock.send(_UNKNOWN)
                if not line.sock.recv(_ANSWER):
                    raise ConnectionResetError from None
                time.sleep(_PAUSE)
        send_message(line.sock, (packet,), fds)

    def _has_put(self, line: _Line, answer: bytes) -> bool:
        if not answer:
            line.close()
            return False
        line.credit = CREDIT.unpack_from(answer, 1)[0] if answer[:1] == b"P" else 0
        self._give_back(line)
        if answer[:1] == b"E":
            limit, used = FULL.unpack_from(answer, 1)
            advice = "load what was sent, or raise it"
            raise DescriptorLimit(errno.EMFILE, "RLIMIT_NOFILE", limit, used, "server", advice)
        return True

    def take(self, key: bytes) -> list[Descriptor]:
        """What was put under *key*. The caller owns the result.

        Raises: AlreadyTaken; DescriptorLimit: of this process, where it is still to be had.
        """
        for _ in range(_ATTEMPTS):
            line = self._unread.pop(key, None)
            try:
                if line is None:
                    line = self._borrow(start=False)
                    line.sock.send(b"T" + key)
                # Looked at first: without a place for them the descriptors would be dropped.
                descriptors = peek_descriptors(line.sock, MAX_DESCRIPTORS)
                answer = line.sock.recv(_ANSWER)
            except NoServer:
                break
            except OSError as error:
                assert line is not None
                if isinstance(error, DescriptorLimit):
                    self._unread[key] = line
                    raise
                self._no_answer(line, error)
                continue
            if answer:
                self._give_back(line)
                if answer == b"T":
                    return descriptors
                break
            line.close()
        raise AlreadyTaken(key.hex())

    def take_back(self, key: bytes) -> None:
        """Nothing is under *key* any more. Raises: NoServer, ServerTimeout."""
        answer = b""
        while not answer:
            line = self._borrow(start=False)
            try:
                line.sock.send(b"R" + key)
                answer = line.sock.recv(_ANSWER)
            except OSError as error:
                self._no_answer(line, error)
            if answer:
                self._give_back(line)
            else:
                line.close()

    def close(self) -> None:
        """Closes this process's connections."""
        for line in self._renew():
            line.close()

    def __del__(self) -> None:
        if hasattr(self, "_unread"):
            self.close()

    # Connections.

    def _no_answer(self, line: _Line, error: OSError) -> bytes:
        """Empty, as at the end of a stream, where it was idle too long or its server has ended:
        another connection may do. Raises what else *error* says."""
        line.close()
        if isinstance(error, BlockingIOError):  # the kernel's timeout
            raise ServerTimeout(self.address, _TIMEOUT) from None
        if not isinstance(error, BrokenPipeError | ConnectionResetError):
            raise error
        return b""

    def _borrow(self, start: bool) -> _Line:
        try:
            return self._idle.pop()
        except IndexError:
            return _Line(self._connect(start))

    def _give_back(self, line: _Line) -> None:
        if len(self._idle) < _IDLE:
            self._idle.append(line)
        else:
            line.close()

    def _connect(self, start: bool) -> socket.socket:
        for attempt in range(_ATTEMPTS):
            try:
                sock = connect(self.address, timeout=_TIMEOUT, kind=socket.SOCK_SEQPACKET)
                break
            except NoServer:
                if not start or attempt == _ATTEMPTS - 1:
                    raise
                _start(self.address)
        try:
            who = peer_credentials(sock)
            if who.uid not in (0, os.geteuid()):
                raise UntrustedServer(self.address, who.uid)
            for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                sock.setsockopt(socket.SOL_SOCKET, option, _TIMEVAL)
        except BaseException:
            sock.close()
            raise
        return sock


_servers: weakref.WeakSet[PrivateServer] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for server in list(_servers):
        server.close()


os.register_at_fork(after_in_child=_after_fork_in_child)


# Starting it


def _start(address: str) -> None:
    """Starts the server at *address*, unless somebody else is doing so.

    A client can connect when this returns; the first answer takes as long as the server's start.
    Raises: UnsupportedPlatform: this Python does not say how to start another; OSError.
    """
    if not sys.executable:
        raise UnsupportedPlatform("a private server", "sys.executable is empty; name a server")
    try:
        listener = listen(address, kind=socket.SOCK_SEQPACKET)
    except AddressInUse:
        time.sleep(_PAUSE)  # bound, and perhaps not listening yet
        return
    # detach(): the name is the server's now, and not ours to remove.
    sock, lock = listener.detach()
    try:
        subprocess.run(
            _command(sock.fileno(), address),
            pass_fds=[sock.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=True,
        )
    finally:
        sock.close()
        if lock is not None:
            lock.close()


def _command(fd: int, address: str) -> list[str]:
    """A fresh interpreter that finds what this one finds; what it starts is a grandchild of ours.

    Without `site` (-S), which costs more than the rest of the start, and which this interpreter has
    run: its sys.path is the result.
    """
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    folder = None if address.startswith("@") else os.path.dirname(address)
    path = [root, *(os.path.abspath(folder) for folder in sys.path if folder)]
    code = (
        "import os, sys\n"
        "if os.fork(): os._exit(0)\n"
        "os.setsid()\n"
        f"sys.path[:] = {path!r}\n"
        "from fdshare.parking.server import serve\n"
        f"serve({fd}, {folder!r})\n"
    )
    return [sys.executable, "-s", "-S", "-c", code]
