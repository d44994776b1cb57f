"""hold(): what is closed straight after it arrives, as often as it was said."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fdshare
from fdshare.errors import AlreadyTaken, ClosedDescriptor, InvalidArgument, UnsupportedKind
from fdshare.mp.pickling.parked import forget

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    yield
    forget()


def test_closed_straight_after_put(armed: None, pair: Pair) -> None:
    near, far = pair
    queue = multiprocessing.Queue()
    queue.put(fdshare.hold(near))
    near.close()
    with queue.get(timeout=20) as arrived:
        assert type(arrived) is socket.socket
        arrived.sendall(b"x")
    assert far.recv(2) == b"x"
    assert far.recv(1) == b""
    queue.close()
    queue.join_thread()


def test_plain_pickle_and_nothing_installed(pair: Pair) -> None:
    near, far = pair
    held = fdshare.hold(near)
    near.close()
    message = pickle.dumps([held, held])
    held.close()
    first, second = pickle.loads(message)
    assert first is second
    first.sendall(b"x")
    first.close()
    assert far.recv(2) == b"x"
    assert far.recv(1) == b""
    with pytest.raises(AlreadyTaken):
        pickle.loads(message)


@pytest.mark.parametrize("named", [False, True])
def test_as_many_uses_as_were_said(pair: Pair, server: Any, named: bool) -> None:
    near, far = pair
    if named:
        fdshare.install(server.address)
    message = pickle.dumps(fdshare.hold(near, uses=3))
    for byte in b"abc":
        with pickle.loads(message) as arrived:
            arrived.send(bytes([byte]))
    assert far.recv(10) == b"abc"
    with pytest.raises(AlreadyTaken):
        pickle.loads(message)
    fdshare.uninstall()


def test_every_pickle_has_its_uses(pair: Pair) -> None:
    held = fdshare.hold(pair[0])
    for message in (pickle.dumps(held), pickle.dumps(held)):
        pickle.loads(message).close()


def test_held_and_not_held_in_one_message(armed: None, pair: Pair) -> None:
    near, far = pair
    pickler = multiprocessing.reduction.ForkingPickler
    message = bytes(pickler.dumps([fdshare.hold(far, uses=2), near, fdshare.hold(far)]))
    arrived = pickle.loads(message)
    arrived[2].sendall(b"x")
    assert arrived[1].recv(1) == b"x"
    assert os.path.sameopenfile(arrived[0].fileno(), arrived[2].fileno())
    for sock in arrived:
        sock.close()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the first object is made, and collected
        with pytest.raises(AlreadyTaken):
            pickle.loads(message)
        gc.collect()


def test_dropped_it_closes(pair: Pair) -> None:
    near, far = pair
    held = fdshare.hold(near)
    near.close()
    far.setblocking(False)
    with pytest.raises(BlockingIOError):
        far.recv(1)
    del held
    assert far.recv(1) == b""


def test_closed_it_cannot_be_sent(pair: Pair) -> None:
    with fdshare.hold(pair[0], uses=2) as held:
        assert repr(held) == "<Held socket uses=2>"
    assert repr(held) == "<Held socket closed>"
    with pytest.raises(ClosedDescriptor):
        pickle.dumps(held)


def test_registered_under_a_name(server: Any, pair: Pair) -> None:
    held = fdshare.hold(pair[0])
    with fdshare.connect(server.address) as client:
        client.register("held", held)
        with client.fetch("held") as fetched:
            assert type(fetched) is socket.socket


def test_a_file_with_a_newline_of_its_own(folder: Path) -> None:
    with open(folder / "text", "w+", newline="") as file:
        file.write("a\r\nb\r\n")
        file.seek(0)
        with pickle.loads(pickle.dumps(fdshare.hold(file, newline="\r\n"))) as arrived:
            assert arrived.readline() == "a\r\n"
            arrived.seek(0, 2)
            arrived.write("c\n")
        with pickle.loads(pickle.dumps(fdshare.hold(file, newline=None))) as arrived:
            arrived.seek(0)
            assert arrived.read() == "a\nb\nc\n"


def test_refusals(pair: Pair, folder: Path) -> None:
    for uses in (0, -1, 1.5, True, None, 1 << 32):
        with pytest.raises(InvalidArgument, match="uses"):
            fdshare.hold(pair[0], uses=uses)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="newline"):
        fdshare.hold(pair[0], newline="\n")
    with open(folder / "f", "wb") as binary, pytest.raises(InvalidArgument, match="newline"):
        fdshare.hold(binary, newline="\n")
    with open(folder / "f") as text, pytest.raises(InvalidArgument, match="newline"):
        fdshare.hold(text, newline="x")
    with pytest.raises(UnsupportedKind):
        fdshare.hold("text")
    pair[0].close()
    with pytest.raises(ClosedDescriptor):
        fdshare.hold(pair[0])
