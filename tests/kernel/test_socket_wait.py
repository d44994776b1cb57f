"""socket_wait: until when, for what, and whatever signals come."""

from __future__ import annotations

import select
import socket
import time

import pytest

from fdshare.kernel.socket_wait import FIRST_WAIT, wait_readable, wait_writable

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture(params=["poll", "select"], autouse=True)
def call(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both calls that it may wait in; eventlet removes the first."""
    if request.param == "select":
        monkeypatch.delattr(select, "poll")


def test_until_it_can_be_read(pair: Pair) -> None:
    near, far = pair
    assert not wait_readable(near, time.monotonic())
    assert not wait_readable(near, time.monotonic() + 0.01)
    far.sendall(b"x")
    for deadline in (None, time.monotonic(), time.monotonic() + 1e9):
        assert wait_readable(near, deadline)
    near.recv(1)
    far.close()
    assert wait_readable(near, None)


def test_until_it_takes_data(pair: Pair) -> None:
    near, far = pair
    assert wait_writable(near, None)
    near.setblocking(False)
    with pytest.raises(BlockingIOError):
        while True:
            near.send(bytes(65536))
    assert not wait_writable(near, time.monotonic() + 0.01)
    far.close()
    assert wait_writable(near, None)


@pytest.mark.usefixtures("signalled")
@pytest.mark.parametrize("wait", [wait_readable, wait_writable])
def test_a_signals_handler_does_not_prolong_it(pair: Pair, wait: object) -> None:
    near, _ = pair
    near.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, FIRST_WAIT)
    with pytest.raises(BlockingIOError):
        near.recv(1)
    near.setblocking(False)
    with pytest.raises(BlockingIOError):
        while True:
            near.send(bytes(65536))
    assert callable(wait)
    assert not wait(near, time.monotonic() + 0.2)
