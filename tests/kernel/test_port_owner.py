"""port_owner: who has a port, against ports that we and a child have."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from typing import Literal

import pytest
from nursery import Process

from fdshare.kernel.port_owner import PortOwner, port_owner

pytestmark = pytest.mark.skipif(not os.path.exists("/proc/net/tcp"), reason="no /proc/net")


@pytest.mark.parametrize("asked", ["127.0.0.1", "0.0.0.0"])
def test_our_own_listener(asked: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert port_owner("tcp", asked, port) == PortOwner(os.geteuid(), os.getpid())
        assert port_owner("tcp", "127.0.0.9", port) is None
        assert port_owner("udp", asked, port) is None
    assert port_owner("tcp", asked, port) is None


def test_a_wildcard_stands_in_everybodys_way() -> None:
    with socket.create_server(("0.0.0.0", 0)) as listener:
        port = listener.getsockname()[1]
        assert port_owner("tcp", "127.0.0.1", port) == PortOwner(os.geteuid(), os.getpid())


def test_ipv6() -> None:
    try:
        listener = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError:
        pytest.skip("no IPv6 here")
    with listener:
        port = listener.getsockname()[1]
        assert port_owner("tcp", "::1", port) == PortOwner(os.geteuid(), os.getpid())
        assert port_owner("tcp", "::2", port) is None


def test_udp() -> None:
    with socket.socket(type=socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
        assert port_owner("udp", "127.0.0.1", port) == PortOwner(os.geteuid(), os.getpid())


OTHER = """
import socket
with socket.create_server(("127.0.0.1", 0)) as listener:
    print(listener.getsockname()[1], flush=True)
    input()
"""


def test_another_process() -> None:
    protocol: Literal["tcp"] = "tcp"
    with subprocess.Popen(
        [sys.executable, "-c", OTHER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        port = int(child.stdout.readline())
        holder = port_owner(protocol, "127.0.0.1", port)
        child.communicate("\n", timeout=30)
    assert holder is not None
    assert holder.uid == os.geteuid()
    # None only where looking through all processes took too long.
    assert holder.pid in (child.pid, None)


def test_the_search_ends_in_the_middle_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which may have a million descriptors."""
    links: list[str] = []

    def readlink(path: str) -> str:
        links.append(path)
        return ""

    monkeypatch.setattr(os, "readlink", readlink)
    monkeypatch.setattr(time, "monotonic", lambda: float(len(links) >= 20))
    duplicates = [os.dup(0) for _ in range(40)]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        owner = port_owner("tcp", "127.0.0.1", listener.getsockname()[1])
    assert owner == PortOwner(os.geteuid(), None)
    for fd in duplicates:
        os.close(fd)
    assert len(links) == 20


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
def test_another_user() -> None:
    code = f"import os; os.setuid(12345){OTHER}"
    with Process(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        owner = port_owner("tcp", "127.0.0.1", int(child.stdout.readline()))
        child.communicate("\n", timeout=30)
    assert owner is not None
    assert owner.uid == 12345
