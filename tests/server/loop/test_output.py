"""output: how connections end."""

from __future__ import annotations

from breaking import leave_unread, lingering_pair, reset
from conftest import Watched

from fdshare.client.blocking.client import Client


def test_nobody_waits_for_the_close_of_what_was_not_read(server: Watched) -> None:
    """A descriptor that lies unread in the socket of a client is closed with that socket."""
    sock, peer = lingering_pair(60)
    try:
        with Client(server.address, timeout=10) as client:
            leave_unread(server.address, server.pid, sock)
            client.ping()
    finally:
        reset(peer)
