"""That system.py alone knows what a system has, and what it says of Linux."""

from __future__ import annotations

import ast
import fcntl
import os
import select
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fdshare
from fdshare.kernel import system

PACKAGE = Path(fdshare.__file__).parent
# The modules of Python whose names differ between systems.
DIFFER = {"os", "socket", "select", "fcntl", "signal", "mmap"}


def questions(tree: ast.AST) -> Iterator[str]:
    """Where a module asks: `sys.platform`, `hasattr(os, ...)`, `getattr(os, ...)`."""
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(ast.Name("sys"), "platform"):
                yield f"{node.lineno}: sys.platform"
            case ast.Call(ast.Name("hasattr" | "getattr"), [ast.Name(name), *_]) if name in DIFFER:
                yield f"{node.lineno}: {ast.unparse(node)}"


def test_no_other_module_asks() -> None:
    asked = {
        str(path.relative_to(PACKAGE)): found
        for path in PACKAGE.rglob("*.py")
        if (found := list(questions(ast.parse(path.read_text()))))
    }
    assert list(asked) == ["kernel/system.py"]


@pytest.mark.skipif(sys.platform != "linux", reason="what Linux has")
def test_linux_lacks_nothing() -> None:
    has = {name: value for name, value in vars(system).items() if name.isupper()}
    del has["HAS_GIL"]  # which a Python lacks, and no system
    assert {**has, "NAME": "linux"} == {
        **dict.fromkeys((name for name in has if name.startswith("HAS_")), True),
        "NAME": "linux",
        "LINUX": True,
        "O_PATH": os.O_PATH,
        "CMSG_CLOEXEC": 0x40000000,  # <bits/socket.h>
        "NOSIGNAL": 0x4000,
        "SOCK_NONBLOCK": socket.SOCK_NONBLOCK,
        "RDHUP": select.POLLRDHUP,
        "SET_PIPE_SIZE": fcntl.F_SETPIPE_SZ,
        "SO_DOMAIN": socket.SO_DOMAIN,
        "SO_PRIORITY": socket.SO_PRIORITY,
        "SO_PROTOCOL": socket.SO_PROTOCOL,
        "UNREAD": 0x5411,
    }


@pytest.mark.skipif(sys.platform == "darwin", reason="it has no such call")
def test_what_the_peer_has_not_read() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        left = bytearray(4)
        fcntl.ioctl(ours, system.UNREAD, left)
        assert not any(left)
        ours.send(b"12345")
        fcntl.ioctl(ours, system.UNREAD, left)
        assert any(left)
