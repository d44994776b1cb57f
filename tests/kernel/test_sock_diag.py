"""sockdiag: queues and inodes, against sockets whose queue we filled ourselves."""

from __future__ import annotations

import os
import socket
import struct
import sys
from pathlib import Path

import pytest

from fdshare.kernel import sock_diag as sockdiag
from fdshare.kernel.sock_diag import TCP_CLOSE_WAIT, TCP_LISTEN, tcp_state, unix_peer, unix_state

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="sock_diag is Linux's")


def inode_of(sock: socket.socket) -> int:
    return os.fstat(sock.fileno()).st_ino


def test_a_unix_listener_tells_its_queue_backlog_and_inode(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind(str(folder / "s"))
        listener.listen(7)
        client.connect(str(folder / "s"))
        state = unix_state(inode_of(listener))
        if state is None:
            pytest.skip("this kernel has no unix_diag")
        assert (state.queue, state.backlog) == (1, 7)
        assert state.inode == (folder / "s").stat().st_ino & 0xFFFFFFFF
        listener.accept()[0].close()
        assert unix_state(inode_of(listener)) == (0, 7, state.inode)


def test_the_peer_of_a_unix_socket_is_known_once_it_is_accepted(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind(str(folder / "s"))
        listener.listen()
        assert unix_peer(inode_of(client)) is None
        client.connect(str(folder / "s"))
        before = unix_peer(inode_of(client))
        if before is None:
            pytest.skip("this kernel has no unix_diag")
        assert before == 0
        with listener.accept()[0] as accepted:
            assert unix_peer(inode_of(client)) == inode_of(accepted) & 0xFFFFFFFF
            assert unix_peer(inode_of(accepted)) == inode_of(client) & 0xFFFFFFFF


def test_an_unbound_unix_socket_has_no_inode() -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        state = unix_state(inode_of(sock))
        assert state is None or state.inode is None


def test_an_inode_that_is_no_unix_socket_is_unknown(folder: Path) -> None:
    with socket.socket() as tcp:
        assert unix_state(inode_of(tcp)) is None


@pytest.mark.parametrize("size", range(40))
def test_a_short_reply_is_refused_or_read_as_far_as_it_goes(size: int) -> None:
    whole = struct.pack("=IHHII", 44, 20, 0, 1, 0) + bytes(16) + struct.pack("=HHII", 12, 4, 3, 9)
    try:
        state = sockdiag._parse(whole[:size])
    except struct.error:
        assert size < 16 or 28 <= size < 44
    else:
        assert state == (None, None, None)
    assert sockdiag._parse(whole) == (3, 9, None)


def test_a_tcp_listener_tells_its_queue_and_backlog() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=5) as listener:
        with socket.create_connection(listener.getsockname()):
            assert tcp_state(listener) == (TCP_LISTEN, 1, 5)
        listener.accept()[0].close()
        assert tcp_state(listener) == (TCP_LISTEN, 0, 5)


def test_a_tcp_connection_tells_its_state() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        accepted, _ = listener.accept()
        with accepted:
            client.close()
            assert accepted.recv(1) == b""
            assert tcp_state(accepted) == (TCP_CLOSE_WAIT, None, None)


def test_what_is_not_tcp_has_no_tcp_state() -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        assert tcp_state(sock) is None
