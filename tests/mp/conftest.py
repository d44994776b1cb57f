"""Fixtures of the tests of mp/."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import fdshare
from fdshare.kernel.credentials import peer_credentials
from fdshare.kernel.endpoint import connect

HERE = Path(__file__).parent


def run(*arguments: str, seconds: float = 100) -> str:
    """What a Python program printed; fails the test unless it ends with status 0."""
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", *arguments],
        capture_output=True,
        text=True,
        timeout=seconds,
        cwd=HERE,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def program() -> Callable[..., str]:
    return run


@pytest.fixture
def armed() -> Iterator[None]:
    """install() for the length of a test."""
    fdshare.install()
    yield
    fdshare.uninstall()


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    near, far = socket.socketpair()
    far.settimeout(20)
    with near, far:
        yield near, far


def server_pid(address: str) -> int:
    """Who listens at a private address: the kernel's answer. It must have answered before."""
    with connect(address, timeout=10, kind=socket.SOCK_SEQPACKET) as sock:
        return peer_credentials(sock).pid


def gone(pidfd: int, seconds: float = 20) -> bool:
    """True once the process has ended."""
    ready, _, _ = select.select([pidfd], [], [], seconds)
    os.close(pidfd)
    return bool(ready)
