"""peer_groups: all groups of a peer, however many."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

import pytest
from conftest import line

from fdshare.kernel import listen, serv_accept
from fdshare.kernel.peer_groups import many_peer_groups

SO_PEERGROUPS = 59
CONNECT = """
    import os, sys
    from fdshare.kernel import cli_conn
    os.setgroups(range(1000, 1000 + int(sys.argv[2])))
    with cli_conn(sys.argv[1]) as conn:
        print("connected", flush=True)
        conn.recv(1)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be in groups")
@pytest.mark.parametrize("count", [1, 257, 1024, 1025, 5000])
def test_all_of_them(folder: Path, child: object, count: int) -> None:
    with listen(folder / "s") as listener:
        process = child(CONNECT, folder / "s", count)  # type: ignore[operator]
        conn, who = serv_accept(listener)
        with conn:
            assert line(process) == "connected"
            groups = many_peer_groups(conn, socket.SOL_SOCKET, SO_PEERGROUPS)
            assert groups == tuple(range(1000, 1000 + count))
            assert (who.groups, who.all_groups) == (groups, True)


def test_what_has_no_peer() -> None:
    with socket.socket() as sock, pytest.raises(OSError) as caught:
        many_peer_groups(sock, socket.SOL_SOCKET, SO_PEERGROUPS)
    assert caught.value.errno in (errno.ENODATA, errno.EOPNOTSUPP, errno.ENOPROTOOPT)
