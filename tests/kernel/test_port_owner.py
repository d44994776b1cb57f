"""port_owner: who has a port, against ports that we and a child have."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
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
