"""What the tests of messages share: two sockets, a file, an interpreter of its own."""

from __future__ import annotations

import array
import itertools
import os
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

import pytest

from fdshare.kernel import Descriptor

Pair = tuple[socket.socket, socket.socket]


def open_count() -> int:
    return len(os.listdir("/proc/self/fd"))


HOARD = """
def hoard(limit):
    '''Every descriptor that is free below *limit*, which is RLIMIT_NOFILE from now on.'''
    import os, resource

    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    taken = []
    try:
        while True:
            taken.append(os.dup(0))
    except OSError:
        return taken
"""


def run(code: str) -> str:
    """What a new interpreter prints that runs *code*, which has the sockets `left` and `right`, and
    may call `hoard`."""
    code = HOARD + textwrap.dedent(code) + "\nleft.close()\nright.close()\n"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return str(done.stdout)


class Refusing(socket.socket):
    """Receives as where a security module refuses descriptors of /dev/zero: those, and what is
    behind them, are dropped (receive_fd, scm_detach_fds). *times*: it does so that often."""

    def __init__(self, sock: socket.socket, times: int = 1000) -> None:
        super().__init__(fileno=os.dup(sock.fileno()))
        self.settimeout(sock.gettimeout())
        self.times = times

    def recvmsg(self, *args: Any) -> Any:
        data, control, flags, address = super().recvmsg(*args)
        return data, *self._refuse(control, flags), address

    def recvmsg_into(self, *args: Any) -> Any:
        count, control, flags, address = super().recvmsg_into(*args)
        return count, *self._refuse(control, flags), address

    def _refuse(self, control: Any, flags: int) -> tuple[Any, int]:
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS)
        others = [each for each in control if each[:2] != rights]
        came = b"".join(each[2] for each in control if each[:2] == rights)
        numbers = array.array("i", came).tolist()
        zero = os.stat("/dev/zero").st_rdev
        allowed = [*itertools.takewhile(lambda fd: os.fstat(fd).st_rdev != zero, numbers)]
        if not self.times or len(allowed) == len(numbers):
            return control, flags
        self.times -= 1
        for fd in numbers[len(allowed) :]:
            os.close(fd)
        if allowed:
            others.append((*rights, array.array("i", allowed).tobytes()))
        return others, flags | socket.MSG_CTRUNC


@pytest.fixture(name="zero")
def make_zero() -> Iterator[int]:
    """A descriptor that `Refusing` refuses."""
    with open("/dev/zero", "rb", buffering=0) as file:
        yield file.fileno()


@pytest.fixture(name="pair")
def make_pair() -> Iterator[Pair]:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    left.settimeout(20)
    right.settimeout(20)
    with left, right:
        yield left, right


@pytest.fixture(name="file")
def make_file(tmp_path: object) -> Iterator[Descriptor]:
    with Descriptor(os.open(f"{tmp_path}/file", os.O_RDWR | os.O_CREAT)) as descriptor:
        yield descriptor
