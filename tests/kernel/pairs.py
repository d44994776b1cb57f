"""What the tests of messages share: two sockets, a file, an interpreter of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator

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
