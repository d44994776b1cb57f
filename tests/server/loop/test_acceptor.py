"""acceptor: who is let in when the server is full."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from breaking import Wire
from nursery import Manager

from fdshare.errors import QuotaExceeded
from fdshare.protocol import messages as m

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be other users")


@contextmanager
def user(uid: int) -> Iterator[None]:
    """Who connects meanwhile is *uid* to the server: SO_PEERCRED is of the moment of connect(2)."""
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)


def waiting(path: str, uid: int) -> Wire:
    """A client of *uid* that waits for a name, and so is not idle."""
    with user(uid):
        wire = Wire(path, f"{uid}")
    wire.send(1, m.Fetch("never", 60.0))
    return wire


@needs_root
def test_the_last_place_is_for_an_administrator(folder: Path) -> None:
    folder.chmod(0o755)
    limits = {"max_connections": 4, "max_connections_per_uid": 3}
    policy = folder / "policy"
    policy.write_text('[[rule]]\neffect = "allow"\nverbs = ["fetch"]\n')
    with Manager(folder / "s", mode=0o666, policy=policy, limits=limits) as manager:
        crowd = [waiting(manager.address, uid) for uid in (1501, 1502, 1503)]
        with user(1504):
            refused = Wire(manager.address, greet=False)
        said = refused.receive().reply
        assert isinstance(said, m.Refused)
        assert repr(m.refusal_error(said)) == repr(QuotaExceeded("max_connections", 4, 3))
        assert manager.stats().connections == 4
        for wire in (*crowd, refused):
            wire.close()
