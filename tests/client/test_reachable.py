"""Whether a client reaches what `bind` found: each way in which it does not."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from fdshare.client.reachable import is_at, why_nobody_can_connect, why_unreachable
from fdshare.protocol.bind_address import parse_address

TCP = parse_address("tcp://127.0.0.1:0")


def bound(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(path))
    sock.listen()
    return sock


def test_what_is_well(folder: Path) -> None:
    path = folder / "a"
    near, far = socket.socketpair()
    with socket.create_server(("127.0.0.1", 0)) as tcp, bound(path) as unix, near, far:
        assert why_unreachable(tcp.fileno(), TCP) == ("", False)
        assert why_unreachable(unix.fileno(), parse_address(f"unix://{path}")) == ("", False)
        assert why_unreachable(near.fileno(), TCP) == ("", False)
    with open(os.devnull) as file, socket.socket() as fresh:
        assert why_unreachable(file.fileno(), TCP) == ("", False)
        assert why_unreachable(fresh.fileno(), TCP) == ("", False)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.bind(("127.0.0.1", 0))
        assert why_unreachable(udp.fileno(), TCP) == ("", False)


def test_a_listener_whose_path_is_gone(folder: Path) -> None:
    path = folder / "a"
    with bound(path) as unix, socket.socket() as fresh:
        assert why_nobody_can_connect(unix.fileno()) == ""
        assert why_nobody_can_connect(fresh.fileno()) == ""
        path.unlink()
        assert "nobody can connect" in why_nobody_can_connect(unix.fileno())


def test_what_is_shut_down(folder: Path) -> None:
    path = folder / "a"
    with socket.create_server(("127.0.0.1", 0)) as tcp, bound(path) as unix:
        tcp.shutdown(socket.SHUT_RDWR)
        unix.shutdown(socket.SHUT_RDWR)
        wrong, gone = why_unreachable(tcp.fileno(), TCP)
        assert "it does not listen" in wrong
        assert not gone
        wrong, gone = why_unreachable(unix.fileno(), parse_address(f"unix://{path}"))
        assert "it is shut down" in wrong
        assert not gone


def test_a_path_is_looked_up_if_it_was_asked_for(folder: Path) -> None:
    path = folder / "a"
    address = parse_address(f"unix://{path}")
    with bound(path) as unix:
        path.unlink()
        wrong, gone = why_unreachable(unix.fileno(), address)
        assert wrong.startswith("nothing is at")
        assert gone
        other = parse_address(f"unix://{folder / 'b'}")
        assert why_unreachable(unix.fileno(), other) == ("", False)
        with bound(path):
            wrong, gone = why_unreachable(unix.fileno(), address)
            assert wrong.startswith("something else is at")
            assert not gone


@pytest.mark.parametrize(
    ("address", "local", "same"),
    [
        ("unix:///run/a", "/run/a", True),
        ("unix:///run/a", "/run/b", False),
        ("unix:@a", "@a", True),
        ("tcp://127.0.0.1:80", "127.0.0.1:80", True),
        ("tcp://127.0.0.1:80", "127.0.0.1:81", False),
        ("tcp://127.0.0.1:0", "127.0.0.1:81", True),
        ("tcp://0.0.0.0:80", "127.0.0.1:80", False),
        ("tcp://[::1]:80", "[::1]:80", True),
        ("tcp://*:80", "*:80", True),
        ("tcp://*:80", "[::]:80", False),
        ("tcp://[::]:80", "*:80", False),
        ("tcp://[fe80::1%eth0]:80", "[fe80::1%2]:80", True),
    ],
)
def test_where_a_socket_is(address: str, local: str, same: bool) -> None:
    assert is_at(parse_address(address), local) is same
