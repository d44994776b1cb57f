"""The transit of channels that are not ours: what is parked, where, and what comes of failures."""

from __future__ import annotations

import gc
import multiprocessing.reduction
import os
import pickle
import shutil
import socket
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from breaking import kill
from users import AsUser, Say, needs_root

import fdshare
from fdshare.errors import AlreadyTaken, KindMismatch, UntrustedServer
from fdshare.kernel.credentials import peer_credentials
from fdshare.kernel.endpoint import connect
from fdshare.mp.pickling import parked
from fdshare.mp.pickling.parked import Parked, Place

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    yield
    fdshare.uninstall()


def dumps(obj: Any) -> bytes:
    return bytes(multiprocessing.reduction.ForkingPickler.dumps(obj))


class Boom:
    """Cannot be loaded."""

    def __reduce__(self) -> Any:
        return _boom, ()


def _boom() -> None:
    raise RuntimeError("boom")


def test_what_is_not_claimed_is_closed(pair: Pair) -> None:
    near, far = pair
    fdshare.install()
    other, _ = others = socket.socketpair()
    message = dumps([other, Boom(), near])
    near.close()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the first object was made, and is collected
        with pytest.raises(RuntimeError, match="boom"):
            pickle.loads(message)
        gc.collect()
    assert far.recv(1) == b""
    for sock in others:
        sock.close()


def test_a_transit_by_itself(pair: Pair) -> None:
    near, far = pair
    kind, fds = fdshare.kinds.describe(near)
    transit = Parked()
    rebuild, arguments = transit.carry(near, kind, fds)
    transit.commit()
    label, tag, spec, first, count = pickle.loads(pickle.dumps(arguments))
    assert (tag, first, count) == ("socket", 0, 1)
    with rebuild(label, tag, spec, first, count) as arrived:
        arrived.sendall(b"x")
    assert far.recv(1) == b"x"
    with pytest.raises(AlreadyTaken):  # the same position again
        rebuild(label, tag, spec, first, count)
    with pytest.raises(AlreadyTaken):  # one that never was
        rebuild(label, tag, spec, 7, 1)


def test_rolled_back_nothing_is_parked(server: Any, pair: Pair) -> None:
    parked.use(Place(server.address, False, 60, parked.load))
    kind, fds = fdshare.kinds.describe(pair[0])
    transit = Parked()
    transit.carry(pair[0], kind, fds)
    transit.rollback()
    transit.commit()
    with fdshare.connect(server.address) as client:
        assert client.names() == []


def test_a_kind_that_does_not_fit(pair: Pair) -> None:
    kind, _ = fdshare.kinds.describe(pair[0])
    reader, writer = os.pipe()
    transit = Parked()
    rebuild, arguments = transit.carry(None, kind, [reader])
    transit.commit()
    with pytest.raises(KindMismatch):
        rebuild(*arguments)
    os.close(reader)
    os.close(writer)


class Many:
    """A kind of a program's own with many descriptors."""

    def __init__(self, fds: list[fdshare.Descriptor]) -> None:
        self.fds = fds


@pytest.fixture
def many_kind() -> Iterator[None]:
    fdshare.register_kind(
        Many, "test-many", lambda m: (len(m.fds), m.fds), lambda n, fds: Many(fds)
    )
    yield
    fdshare.unregister_kind("test-many")


@pytest.mark.parametrize("named", [False, True])
def test_objects_that_straddle_entries(many_kind: None, server: Any, named: bool) -> None:
    fdshare.install(server.address if named else None)
    reader, writer = os.pipe()
    ends = (os.stat(f"/dev/fd/{reader}").st_ino, os.stat(f"/dev/fd/{writer}").st_ino)
    source = fdshare.Descriptor(reader), fdshare.Descriptor(writer)
    sent = [
        Many([source[0].dup() for _ in range(200)]),
        Many([source[1].dup() for _ in range(200)]),
    ]
    arrived = pickle.loads(dumps(sent))
    for many, inode in zip(arrived, ends, strict=True):
        assert {os.fstat(d.fileno()).st_ino for d in many.fds} == {inode}
    for many in [*sent, *arrived]:
        for descriptor in many.fds:
            descriptor.close()
    for descriptor in source:
        descriptor.close()


def test_forked_children_share_the_address() -> None:
    code = """
import os, fdshare
from fdshare.mp.pickling import parked
fdshare.install()
here = parked.current().address
if os.fork() == 0:
    assert parked.current().address == here
    os._exit(0)
assert os.waitstatus_to_exitcode(os.wait()[1]) == 0
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=60)


def test_a_loader_learns_the_address(pair: Pair) -> None:
    """A process that has parked nothing yet uses the server of what it was sent, unarmed."""
    fdshare.install()
    message = dumps(pair[0])
    here = parked.current().address
    code = f"""
import pickle
from fdshare.mp.pickling import parked
from multiprocessing.reduction import ForkingPickler
pickle.loads({message!r}).close()
assert parked.current().address == {here!r}
assert parked.current().loader is parked.load
assert "reducer_override" not in vars(ForkingPickler)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


STRANGER = 1501


@contextmanager
def squatted(address: str) -> Iterator[None]:
    """While a stranger has both names of the private server at *address*."""
    folder = os.path.dirname(address)

    def task(say: Say) -> object:
        os.mkdir(folder)
        stranger = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        stranger.bind(f"\0{os.path.basename(folder)}")
        stranger.listen()
        say("squats")
        return stranger

    with AsUser(STRANGER, task) as stranger:
        assert stranger.hear() == "squats"
        yield
    os.rmdir(folder)


def check(message: bytes, far: socket.socket) -> None:
    with pickle.loads(message) as arrived:
        arrived.sendall(b"x")
    assert far.recv(1) == b"x"


@needs_root
def test_a_stranger_at_our_address(pair: Pair) -> None:
    """Once used, the name of a private server is known to everybody on the machine."""
    fdshare.install()
    here = parked.current().address
    with squatted(here):
        check(dumps(pair[0]), pair[1])
    assert parked.current().address != here


def end_server() -> str:
    """Kills the private server, and removes what it leaves; its address."""
    place = parked.current()
    with connect(place.address, kind=socket.SOCK_SEQPACKET) as sock:
        kill(peer_credentials(sock).pid)
    shutil.rmtree(os.path.dirname(place.address))
    return place.address


@needs_root
def test_a_stranger_at_the_address_of_a_dead_server(pair: Pair) -> None:
    fdshare.install()
    check(dumps(pair[0]), pair[1])
    here = end_server()
    with squatted(here):
        check(dumps(pair[0]), pair[1])  # where it was sent is seen before it is in the pickle
        assert parked.current().address != here
        here = end_server()
        with squatted(here):
            with pytest.raises(UntrustedServer):
                dumps([pair[0]])
            (arrived,) = pickle.loads(dumps([pair[0]]))
            arrived.close()
            assert parked.current().address != here


WITHOUT_NUMBERS = """
import ctypes, socket, sys
import fdshare
from fdshare.errors import UntrustedServer
from multiprocessing.reduction import ForkingPickler
fdshare.install()
if ctypes.CDLL(None).unshare(0x10000000):  # CLONE_NEWUSER
    sys.exit(77)
for _ in range(2):
    with socket.socket() as sock:
        try:
            ForkingPickler.dumps(sock)
        except UntrustedServer as error:
            print(error.reason)
"""


def test_where_no_server_can_be_ours_it_does_not_try_for_ever() -> None:
    """In a user namespace without a mapping the kernel shows all users as one."""
    command = [sys.executable, "-c", WITHOUT_NUMBERS]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=60)
    if done.returncode == 77:
        pytest.skip("unshare(2) is not allowed here")
    why = "as every user is shown that has no number in this user namespace"
    assert done.stdout.splitlines() == [why, why]


def test_killed_it_is_started_at_the_same_address(pair: Pair) -> None:
    fdshare.install()
    lost = dumps(pair[0])
    place = parked.current()
    with connect(place.address, kind=socket.SOCK_SEQPACKET) as sock:
        kill(peer_credentials(sock).pid)
    check(dumps(pair[0]), pair[1])
    assert parked.current() is place
    with pytest.raises(AlreadyTaken):
        pickle.loads(lost)
