"""The private server's own protocol, packet by packet, and what it does with rude guests."""

from __future__ import annotations

import array
import os
import random
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from conftest import wait_until

from fdshare.parking.server import CREDIT, FULL, KEY, PUT

ADDRESS = "\0fdshare-test-cloakroom-"
Pair = tuple[socket.socket, socket.socket]
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
A, B = b"a" * KEY, b"b" * KEY


class Room:
    """A cloakroom in a process of its own; guests of it are bare sockets."""

    def __init__(self, limit: int) -> None:
        self.name = ADDRESS + os.urandom(8).hex()
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(self.name)
            listener.listen(100)
            code = (
                f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({limit}, {limit}))\n"
                f"from fdshare.parking.server import serve; serve({listener.fileno()})"
            )
            self.guests = [self.guest()]  # before it looks whether anybody is there
            self.process = subprocess.Popen(
                [sys.executable, "-c", code], pass_fds=[listener.fileno()]
            )

    def guest(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.settimeout(20)
        sock.connect(self.name)
        return sock

    def census(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))


@pytest.fixture
def room(request: pytest.FixtureRequest) -> Iterator[Room]:
    room = Room(getattr(request, "param", 1024))
    yield room
    room.process.kill()
    room.process.wait()
    for guest in room.guests:
        guest.close()


@pytest.fixture
def guest(room: Room) -> socket.socket:
    return room.guests[0]


def ask(guest: socket.socket, packet: bytes, fds: tuple[int, ...] = ()) -> tuple[bytes, list[int]]:
    """The answer and its descriptors."""
    control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    guest.sendmsg([packet], control)
    data, got, _, _ = guest.recvmsg(100, 4096, socket.MSG_CMSG_CLOEXEC)
    numbers = array.array("i")
    for _, _, part in got:
        numbers.frombytes(part)
    return data, list(numbers)


def put(guest: socket.socket, key: bytes, *fds: int, ttl: float = 60, uses: int = 1) -> bytes:
    """The answer, without the credit."""
    answer = ask(guest, b"P" + key + PUT.pack(ttl, uses), fds)[0]
    return b"P" if answer[:1] == b"P" and len(answer) == 1 + CREDIT.size else answer


def open_hatch(guest: socket.socket) -> socket.socket:
    """What the guest puts in here is not waited for."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        assert ask(guest, b"L", (theirs.fileno(),)) == (b"L", [])
    return ours


def put_aside(hatch: socket.socket, key: bytes, *fds: int) -> None:
    control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
    hatch.sendmsg([b"P" + key + PUT.pack(60, 1)], control)


@contextmanager
def stopped(room: Room) -> Iterator[None]:
    """While it sleeps requests pile up; it finds all of them at once."""
    os.kill(room.process.pid, signal.SIGSTOP)
    yield
    os.kill(room.process.pid, signal.SIGCONT)


def taken(guest: socket.socket, key: bytes) -> int:
    """How many descriptors were given; they are closed."""
    answer, fds = ask(guest, b"T" + key)
    assert answer == (b"T" if fds else b"N")
    for fd in fds:
        os.close(fd)
    return len(fds)


def test_put_and_take(guest: socket.socket, pair: Pair) -> None:
    near, far = pair
    assert put(guest, A, near.fileno(), far.fileno()) == b"P"
    assert taken(guest, B) == 0
    answer, (first, second) = ask(guest, b"T" + A)
    assert answer == b"T"
    assert os.path.sameopenfile(first, near.fileno())
    assert os.path.sameopenfile(second, far.fileno())
    os.close(first)
    os.close(second)
    assert taken(guest, A) == 0


def test_what_is_given_is_closed(room: Room, guest: socket.socket, pair: Pair) -> None:
    near, far = pair
    put(guest, A, near.fileno())
    near.close()
    assert taken(guest, A) == 1
    assert far.recv(1) == b""


def test_through_the_hatch(room: Room, guest: socket.socket, pair: Pair) -> None:
    fd = pair[0].fileno()
    answer, _ = ask(guest, b"P" + A + PUT.pack(60, 1), (fd,))
    assert CREDIT.unpack(answer[1:]) == (32,)
    hatch = open_hatch(guest)
    other = room.guest()
    keys = [bytes([number]) * KEY for number in range(32)]
    for key in keys[:3]:
        put_aside(hatch, key, fd)
        assert taken(other, key) == 1
        assert taken(other, key) == 0
    for key in keys[3:]:
        put_aside(hatch, key, fd)
    assert sum(taken(other, key) for key in keys) == 29
    put_aside(hatch, A, fd)  # it has had its credit
    assert put(guest, B, fd) == b"P"  # and a new one
    put_aside(hatch, keys[0], fd)
    assert taken(other, keys[0]) == 1
    other.close()
    hatch.close()


def test_its_sender_may_end(room: Room, guest: socket.socket, pair: Pair) -> None:
    fd = pair[0].fileno()
    put(guest, A, fd)
    hatch = open_hatch(guest)
    other = room.guest()
    assert taken(other, B) == 0
    with stopped(room):
        for number in range(32):
            put_aside(hatch, bytes([number]) * KEY, fd)
        other.send(b"T" + bytes([31]) * KEY)
        hatch.close()
        guest.close()
    data, control, _, _ = other.recvmsg(10, 100, socket.MSG_CMSG_CLOEXEC)
    assert data == b"T"
    os.close(array.array("i", control[0][2])[0])
    assert sum(taken(other, bytes([number]) * KEY) for number in range(32)) == 31
    other.close()


def test_what_waits_in_a_hatch_can_be_let_go(room: Room, guest: socket.socket, pair: Pair) -> None:
    put(guest, A, pair[0].fileno())
    hatch = open_hatch(guest)
    put_aside(hatch, B, pair[0].fileno())
    other = room.guest()
    assert ask(other, b"R" + B) == (b"R", [])
    assert taken(other, B) == 0
    other.close()
    hatch.close()


def test_what_waits_in_a_hatch_has_a_time_to_live(
    room: Room, guest: socket.socket, pair: Pair
) -> None:
    near, far = pair
    put(guest, A, near.fileno())
    assert taken(guest, A) == 1
    hatch = open_hatch(guest)
    control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [near.fileno()]))]
    hatch.sendmsg([b"P" + B + PUT.pack(0.01, 1)], control)
    near.close()
    assert far.recv(1) == b""  # it looks now and then
    hatch.close()


@pytest.mark.parametrize("room", [64], indirect=True)
def test_what_is_put_on_credit_has_room(room: Room, guest: socket.socket, pair: Pair) -> None:
    fd = pair[0].fileno()
    answer, _ = ask(guest, b"P" + A + PUT.pack(60, 1), (fd,))
    assert CREDIT.unpack(answer[1:]) == (2,)  # a quarter of an eighth
    hatch = open_hatch(guest)
    other = room.guest()
    assert put(other, B, *[fd] * 23) == b"P"
    assert put(other, b"c" * KEY, fd)[:1] == b"E"
    put_aside(hatch, b"d" * KEY, fd, fd)
    put_aside(hatch, b"e" * KEY, fd)  # one too many
    assert taken(other, b"e" * KEY) == 0
    assert taken(other, b"d" * KEY) == 2
    other.close()
    hatch.close()


def test_rude_hatches(room: Room, guest: socket.socket, pair: Pair) -> None:
    fd = pair[0].fileno()
    put(guest, A, fd)
    before = room.census()
    other = room.guest()
    with open("/dev/null") as file:
        other.sendmsg(
            [b"L"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [file.fileno()]))]
        )
        assert other.recv(10) == b""
    hatch = open_hatch(guest)
    for packet in (b"", b"x", b"T" + A, b"P" * 31):
        hatch.sendmsg(
            [packet], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd, fd]))]
        )
    assert taken(guest, B) == 0
    hatch.close()
    assert taken(guest, B) == 0
    wait_until(lambda: room.census() == before)
    assert taken(guest, A) == 1
    other.close()


def test_uses(guest: socket.socket, pair: Pair) -> None:
    put(guest, A, pair[0].fileno(), uses=3)
    assert [taken(guest, A) for _ in range(5)] == [1, 1, 1, 0, 0]


def test_let_go(guest: socket.socket, pair: Pair) -> None:
    near, far = pair
    put(guest, A, near.fileno())
    near.close()
    assert ask(guest, b"R" + A) == (b"R", [])
    assert far.recv(1) == b""
    assert ask(guest, b"R" + A) == (b"R", [])


def test_the_same_key_again(guest: socket.socket, pair: Pair) -> None:
    """The client repeats what was not answered."""
    near, far = pair
    assert put(guest, A, near.fileno()) == b"P"
    assert put(guest, A, far.fileno()) == b"P"
    _, (fd,) = ask(guest, b"T" + A)
    assert os.path.sameopenfile(fd, far.fileno())
    os.close(fd)


def test_time_to_live(guest: socket.socket, pair: Pair) -> None:
    near, far = pair
    put(guest, A, near.fileno(), ttl=0.05)
    put(guest, B, far.fileno(), ttl=60)
    near.close()
    assert far.recv(1) == b""
    assert (taken(guest, A), taken(guest, B)) == (0, 1)


def test_equal_deadlines_and_removals(room: Room, guest: socket.socket, pair: Pair) -> None:
    near, far = pair
    assert taken(guest, A) == 0  # it has started
    before = room.census()
    keys = [bytes([number]) * KEY for number in range(100)]
    for key in keys:
        put(guest, key, near.fileno(), ttl=0.3)
    for key in keys[::2]:
        ask(guest, b"R" + key)
    near.close()
    assert far.recv(1) == b""
    wait_until(lambda: room.census() == before)


def test_time_passes_while_it_is_busy(guest: socket.socket, pair: Pair) -> None:
    near, far = pair
    put(guest, A, near.fileno(), ttl=0.05)
    near.close()
    far.setblocking(False)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        assert taken(guest, B) == 0
        try:
            assert far.recv(1) == b""
            return
        except BlockingIOError:
            pass
    raise AssertionError("it never found time")


@pytest.mark.parametrize("room", [64], indirect=True)
def test_its_limit(room: Room, guest: socket.socket, pair: Pair) -> None:
    fd = pair[0].fileno()
    assert put(guest, A, *[fd] * 22) == b"P"
    answer = put(guest, B, *[fd] * 3)
    assert (answer[:1], FULL.unpack(answer[1:])) == (b"E", (24, 22))
    answer = put(guest, B, *[fd] * 253)  # more than it has numbers for
    assert answer[:1] == b"E"
    assert put(guest, B, fd, fd) == b"P"
    assert taken(guest, A) == 22
    assert put(guest, A, *[fd] * 22) == b"P"
    # The door: who was idle longest makes room, and what is kept stays.
    for _ in range(60):
        room.guests.append(room.guest())
        assert taken(room.guests[-1], b"?" * KEY) == 0
    with pytest.raises(BrokenPipeError):
        while True:
            put(guest, A, fd)
    assert (taken(room.guests[-1], A), taken(room.guests[-1], B)) == (22, 2)


def test_rude_guests(room: Room, guest: socket.socket, pair: Pair) -> None:
    fd = pair[0].fileno()
    put(guest, A, fd)
    before = room.census()
    dice = random.Random(7)
    rude = [
        b"",
        b"P",
        b"T",
        b"R" + A[:-1],
        b"T" + A + b"x",
        b"P" + A + PUT.pack(1, 1) + b"x",
        b"P" + A + PUT.pack(1, 1),  # and no descriptor
        b"X" + A,
        b"\0" * 4096,
        *(dice.randbytes(dice.randrange(1, 300)) for _ in range(50)),
    ]
    for packet in rude:
        for fds in ((), (fd, fd)):
            if packet[:1] == b"P" and len(packet) == 1 + KEY + PUT.size and fds:
                continue  # that one is in order
            other = room.guest()
            control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
            other.sendmsg([packet], control if fds else [])
            assert other.recv(100) == b""
            other.close()
    assert taken(guest, A) == 1
    wait_until(lambda: room.census() == before - 1)


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), -1.0, 0.0])
def test_odd_times(room: Room, guest: socket.socket, pair: Pair, seconds: float) -> None:
    assert put(guest, A, pair[0].fileno(), ttl=seconds)[:1] == b"E"
    other = room.guest()
    assert put(other, B, pair[0].fileno()) == b"P"
    assert taken(other, B) == 1
    other.close()


def test_a_guest_that_reads_nothing(room: Room, guest: socket.socket, pair: Pair) -> None:
    other = room.guest()
    other.setblocking(False)
    with pytest.raises((BlockingIOError, BrokenPipeError, ConnectionResetError)):
        while True:
            other.send(b"R" + A)
            put(guest, A, pair[0].fileno())
    other.close()
    assert put(guest, A, pair[0].fileno()) == b"P"
    assert taken(guest, A) == 1


@AS_ROOT
def test_other_users_are_not_let_in(room: Room, guest: socket.socket, pair: Pair) -> None:
    put(guest, A, pair[0].fileno())
    child = os.fork()
    if not child:
        status = 1
        try:
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            stranger = room.guest()
            try:
                stranger.send(b"T" + A)
                status = 0 if stranger.recv(100) == b"" else 2
            except (BrokenPipeError, ConnectionResetError):
                status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert taken(guest, A) == 1


def test_it_goes_home(room: Room, guest: socket.socket, pair: Pair) -> None:
    put(guest, A, pair[0].fileno(), ttl=0.1)
    guest.close()
    pidfd = os.pidfd_open(room.process.pid)
    ready, _, _ = select.select([pidfd], [], [], 20)
    os.close(pidfd)
    assert ready
    assert room.process.wait() == 0


def test_the_formats() -> None:
    """Written down, so that nobody changes one half."""
    assert PUT.pack(1.5, 2) == struct.pack("=dI", 1.5, 2)
    assert (KEY, PUT.size, FULL.size, CREDIT.size) == (18, 12, 8, 4)
    assert resource.RLIMIT_NOFILE is not None
