"""Whether a new version answers, beside an old one that accepts from the same socket.

The kernel gives a connection to whichever process accepts it. So the kernel is asked who has the
other end, and what the old version answers does not count.
"""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.parse
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Self

from fdshare.kernel.descriptor import Descriptor
from fdshare.kernel.sock_diag import unix_peer

__all__ = ["CheckCommand", "HealthProbe", "Target"]

_TIMEOUT: Final = 5.0  # seconds for a connection, an answer
_ACCEPTED: Final = 1.0  # seconds until a connection is accepted
_PAUSE: Final = 0.01
_LOOK: Final = 0.1  # seconds that one call waits for the end of a check
_ATTEMPTS: Final = 5  # connections in a row, since the old version accepts some of them


@dataclass(slots=True)
class CheckCommand:
    """A command of the shell, which succeeds when the version *pid* is ready.

    It takes the time it needs. It has a process group of its own, which is killed if it still runs
    at the end.
    """

    command: str
    pid: int
    _running: subprocess.Popen[bytes] | None = None
    _last: str = "--check has not ended"  # what is wrong

    def __call__(self) -> str:
        """Empty if it succeeded; else why not, also while it runs. One that failed is started
        again by the next call."""
        if self._running is None:
            self._running = subprocess.Popen(
                ["/bin/sh", "-c", self.command],
                env={**os.environ, "FDSHARE_DEPLOY_PID": str(self.pid)},
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr,
                process_group=0,
            )
        try:
            status = self._running.wait(_LOOK)
        except subprocess.TimeoutExpired:
            return self._last
        self._running = None
        self._last = f"--check ended with status {status}" if status else ""
        return self._last

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._running is None:
            return
        with suppress(PermissionError):  # it has become another user's (sudo), and goes on
            os.killpg(self._running.pid, signal.SIGKILL)
            self._running.wait()


@dataclass(frozen=True, slots=True)
class Target:
    """What is asked: "tcp", "/PATH", or "http://HOST:PORT/PATH"."""

    path: str  # of the request; empty: to accept is enough
    host: str = ""  # empty: the address of the listener
    port: int = 80

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises: ValueError: it is none of them."""
        if text == "tcp":
            return cls("")
        if text.startswith("/"):
            return cls(text)
        if not text.startswith("http://"):
            raise ValueError(f"not {text!r}")
        url = urllib.parse.urlsplit(text)
        path = urllib.parse.urlunsplit(("", "", url.path or "/", url.query, ""))
        return cls(path, url.hostname or "127.0.0.1", 80 if url.port is None else url.port)


class HealthProbe:
    """Asks *target*, at the address of *listener* if it has no host of its own.

    *listener* is borrowed while this is used. *pid* leads the session of the new version.
    """

    def __init__(self, target: Target, listener: Descriptor, pid: int) -> None:
        self._pid = pid
        self._last = "no process of it accepted a connection"  # what is wrong with the new one
        self._http = target.path
        with listener.dup().socket() as sock:
            self._family, self._address = sock.family, sock.getsockname()
        if target.host:
            self._family = socket.AF_INET6 if ":" in target.host else socket.AF_INET
            self._address = (target.host, target.port)
        elif self._family == socket.AF_INET and self._address[0] == "0.0.0.0":
            self._address = ("127.0.0.1", self._address[1])
        elif self._family == socket.AF_INET6 and self._address[0] == "::":
            self._address = ("::1", self._address[1])

    def __call__(self) -> str:
        """Empty if the new version answered; else why not."""
        for _ in range(_ATTEMPTS):
            try:
                if self._reaches_new():
                    break
            except OSError as error:
                self._last = str(error)
                break
        return self._last

    def _reaches_new(self) -> bool:
        """Whether the new version accepted; what it answered is kept."""
        with socket.socket(self._family) as sock:
            sock.settimeout(_TIMEOUT)
            sock.connect(self._address)
            if not self._is_accepted_by_new(sock):
                return False
            self._last = self._ask(sock) if self._http else ""
            return True

    def _ask(self, sock: socket.socket) -> str:
        request = f"GET {self._http} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        sock.sendall(request.encode())
        with sock.makefile("rb") as answer:
            words = answer.readline(1000).decode("latin-1").split(maxsplit=1)
        if len(words) < 2 or not words[0].startswith("HTTP/"):
            return f"GET {self._http} has no answer"
        return "" if words[1][:1] in "23" else f"GET {self._http}: {words[1].strip()}"

    def _is_accepted_by_new(self, sock: socket.socket) -> bool:
        deadline = time.monotonic() + _ACCEPTED
        while time.monotonic() < deadline:
            inode = _inode_of_other_end(sock)
            if inode:
                return _has_socket(self._pid, inode)
            time.sleep(_PAUSE)
        return False


def _inode_of_other_end(sock: socket.socket) -> int:
    """The number of the accepted socket; 0 until it is accepted, or if that is not known."""
    if sock.family == socket.AF_UNIX:
        return unix_peer(os.fstat(sock.fileno()).st_ino) or 0
    ends = [sock.getpeername()[:2], sock.getsockname()[:2]]
    if sock.family == socket.AF_INET6:
        return _inode_of("tcp6", ends)
    # A listener for both (tcp://*:80) accepts it as an IPv6 socket with mapped addresses.
    mapped = [(f"::ffff:{host}", port) for host, port in ends]
    return _inode_of("tcp", ends) or _inode_of("tcp6", mapped)


def _inode_of(table: str, ends: list[tuple[str, int]]) -> int:
    """The number of the socket between *ends*, its own first; 0 if it is not there."""
    wanted = [_hex(*end) for end in ends]
    try:
        with open(f"/proc/net/{table}") as file:  # proc_pid_net(5)
            for line in file:
                fields = line.split()
                if fields[1:3] == wanted:
                    return int(fields[9])
    except FileNotFoundError:  # there is no IPv6
        pass
    return 0


def _hex(host: str, port: int) -> str:
    """An address as /proc/net/tcp has it: each word of four bytes in the order of the machine."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    packed = socket.inet_pton(family, host.partition("%")[0])
    words = struct.unpack(f"={len(packed) // 4}I", packed)
    return "".join(f"{word:08X}" for word in words) + f":{port:04X}"


def _has_socket(session: int, inode: int) -> bool:
    """Whether a process of *session* has that socket open."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/stat", "rb") as file:
                if int(file.read().rpartition(b")")[2].split()[3]) != session:
                    continue
            links = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
        except (OSError, ValueError, IndexError):  # it has ended, or closed something
            continue
        if f"socket:[{inode}]" in links:
            return True
    return False
