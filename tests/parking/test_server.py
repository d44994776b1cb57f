"""The private server, packet by packet; and clients that do not keep to the protocol."""

from __future__ import annotations

import array
import os
import random
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
from breaking import open_of
from conftest import wait_until
from hanging import FLUSH, HangingFileSystem, needs_fuse
from users import AsUser

from fdshare.kernel.passing import recv_fds
from fdshare.parking.protocol import (
    CREDIT,
    FULL,
    KEY_SIZE,
    ONE_WAY,
    PUT,
    PUT_SIZE,
    REMOVE,
    TAKE,
    UNKNOWN,
    USAGE,
    put_packet,
)

ADDRESS = "\0fdshare-test-parking-"
Pair = tuple[socket.socket, socket.socket]
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
A, B = b"a" * KEY_SIZE, b"b" * KEY_SIZE


class Server:
    """A private server in a process of its own; its clients are bare sockets."""

    def __init__(self, limit: int, first: str = "", fds: tuple[int, ...] = ()) -> None:
        """*first* is code that it runs first, with *fds*."""
        self.name = ADDRESS + os.urandom(8).hex()
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(self.name)
            listener.listen(100)
            code = (
                f"{first}\n"
                f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({limit}, {limit}))\n"
                f"from fdshare.parking.server import serve; serve([{listener.fileno()}], '@test')"
            )
            self.clients = [self.client()]  # before it looks whether anybody is there
            self.process = subprocess.Popen(
                [sys.executable, "-c", code], pass_fds=[listener.fileno(), *fds]
            )

    def client(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.settimeout(20)
        sock.connect(self.name)
        return sock

    def census(self) -> int:
        return len(open_of(self.process.pid))


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    server = Server(getattr(request, "param", 1024))
    yield server
    server.process.kill()
    server.process.wait()
    for client in server.clients:
        client.close()


@pytest.fixture
def client(server: Server) -> socket.socket:
    return server.clients[0]


def ask(client: socket.socket, packet: bytes, fds: tuple[int, ...] = ()) -> tuple[bytes, list[int]]:
    """The answer and its descriptors."""
    control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    client.sendmsg([packet], control)
    data, got, _, _ = client.recvmsg(100, 4096, socket.MSG_CMSG_CLOEXEC)
    numbers = array.array("i")
    for _, _, part in got:
        numbers.frombytes(part)
    return data, list(numbers)


def put(client: socket.socket, key: bytes, *fds: int, ttl: float = 60, uses: int = 1) -> bytes:
    """The answer, without the credit."""
    answer = ask(client, put_packet(key, ttl, uses), fds)[0]
    return PUT if answer[:1] == PUT and len(answer) == 1 + CREDIT.size else answer


def open_one_way(client: socket.socket) -> socket.socket:
    """A one-way socket: what the client puts there is not answered."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        assert ask(client, ONE_WAY, (theirs.fileno(),)) == (ONE_WAY, [])
    return ours


def put_one_way(one_way: socket.socket, key: bytes, *fds: int) -> None:
    control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
    one_way.sendmsg([put_packet(key, 60, 1)], control)


def send_file(files: HangingFileSystem, sock: socket.socket, say: Callable[[object], None]) -> None:
    """What `AsUser` can run: it sends a descriptor of the file of *files*."""
    file = files.open()
    socket.send_fds(sock, [b"f"], [file])
    os.close(file)
    say("sent")


@contextmanager
def stopped(server: Server) -> Iterator[None]:
    """While it sleeps requests pile up; it finds all of them at once."""
    os.kill(server.process.pid, signal.SIGSTOP)
    yield
    os.kill(server.process.pid, signal.SIGCONT)


def taken(client: socket.socket, key: bytes) -> int:
    """How many descriptors were given; they are closed."""
    answer, fds = ask(client, TAKE + key)
    assert answer == (TAKE if fds else UNKNOWN)
    for fd in fds:
        os.close(fd)
    return len(fds)


@pytest.mark.parametrize("mode", ["normal", "all"])
def test_it_imports_nothing_while_it_serves(
    monkeypatch: pytest.MonkeyPatch, pair: Pair, mode: str
) -> None:
    """Without a free descriptor it could not, whatever Python 3.15 puts off."""
    monkeypatch.setenv("PYTHON_LAZY_IMPORTS", mode)
    reading, writing = os.pipe()
    trace = (
        "import os, sys; sys.addaudithook(lambda event, args, write=os.write: "
        f"event == 'import' and write({writing}, args[0].encode() + b' '))"
    )
    server = Server(1024, trace, (writing,))
    os.close(writing)
    client = server.clients[0]
    assert taken(client, A) == 0  # it serves
    assert b"fdshare.parking.server " in os.read(reading, 1 << 16)
    assert put(client, A, pair[0].fileno()) == PUT
    with open_one_way(client) as one_way:
        put_one_way(one_way, B, pair[0].fileno())
        assert [taken(client, key) for key in (A, B)] == [1, 1]
    client.close()
    assert server.process.wait(20) == 0
    # What the interpreter imports at its end is none of ours.
    assert os.read(reading, 1 << 16).split() in ([], [b"threading"])
    os.close(reading)


def test_put_and_take(client: socket.socket, pair: Pair) -> None:
    near, far = pair
    assert put(client, A, near.fileno(), far.fileno()) == PUT
    assert taken(client, B) == 0
    answer, (first, second) = ask(client, TAKE + A)
    assert answer == TAKE
    assert os.path.sameopenfile(first, near.fileno())
    assert os.path.sameopenfile(second, far.fileno())
    os.close(first)
    os.close(second)
    assert taken(client, A) == 0


def test_what_is_given_is_closed(server: Server, client: socket.socket, pair: Pair) -> None:
    near, far = pair
    put(client, A, near.fileno())
    near.close()
    assert taken(client, A) == 1
    assert far.recv(1) == b""


def test_puts_without_an_answer(server: Server, client: socket.socket, pair: Pair) -> None:
    fd = pair[0].fileno()
    answer, _ = ask(client, put_packet(A, 60, 1), (fd,))
    assert CREDIT.unpack(answer[1:]) == (32,)
    one_way = open_one_way(client)
    other = server.client()
    keys = [bytes([number]) * KEY_SIZE for number in range(32)]
    for key in keys[:3]:
        put_one_way(one_way, key, fd)
        assert taken(other, key) == 1
        assert taken(other, key) == 0
    for key in keys[3:]:
        put_one_way(one_way, key, fd)
    assert sum(taken(other, key) for key in keys) == 29
    put_one_way(one_way, A, fd)  # it has had its credit
    assert put(client, B, fd) == PUT  # and a new one
    put_one_way(one_way, keys[0], fd)
    assert taken(other, keys[0]) == 1
    other.close()
    one_way.close()


def test_its_sender_may_end(server: Server, client: socket.socket, pair: Pair) -> None:
    fd = pair[0].fileno()
    put(client, A, fd)
    one_way = open_one_way(client)
    other = server.client()
    assert taken(other, B) == 0
    with stopped(server):
        for number in range(32):
            put_one_way(one_way, bytes([number]) * KEY_SIZE, fd)
        other.send(TAKE + bytes([31]) * KEY_SIZE)
        one_way.close()
        client.close()
    data, control, _, _ = other.recvmsg(10, 100, socket.MSG_CMSG_CLOEXEC)
    assert data == TAKE
    os.close(array.array("i", control[0][2])[0])
    assert sum(taken(other, bytes([number]) * KEY_SIZE) for number in range(32)) == 31
    other.close()


def test_what_was_put_one_way_can_be_removed(
    server: Server, client: socket.socket, pair: Pair
) -> None:
    put(client, A, pair[0].fileno())
    one_way = open_one_way(client)
    put_one_way(one_way, B, pair[0].fileno())
    other = server.client()
    assert ask(other, REMOVE + B) == (REMOVE, [])
    assert taken(other, B) == 0
    other.close()
    one_way.close()


def test_what_was_put_one_way_has_a_time_to_live(
    server: Server, client: socket.socket, pair: Pair
) -> None:
    near, far = pair
    put(client, A, near.fileno())
    assert taken(client, A) == 1
    one_way = open_one_way(client)
    control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [near.fileno()]))]
    one_way.sendmsg([put_packet(B, 0.01, 1)], control)
    near.close()
    assert far.recv(1) == b""  # it reads them every few seconds
    one_way.close()


@pytest.mark.parametrize("server", [64], indirect=True)
def test_what_is_put_on_credit_is_not_refused(
    server: Server, client: socket.socket, pair: Pair
) -> None:
    fd = pair[0].fileno()
    answer, _ = ask(client, put_packet(A, 60, 1), (fd,))
    assert CREDIT.unpack(answer[1:]) == (2,)  # a quarter of an eighth
    one_way = open_one_way(client)
    other = server.client()
    assert put(other, B, *[fd] * 23) == PUT
    assert put(other, b"c" * KEY_SIZE, fd)[:1] == FULL
    put_one_way(one_way, b"d" * KEY_SIZE, fd, fd)
    put_one_way(one_way, b"e" * KEY_SIZE, fd)  # one too many
    assert taken(other, b"e" * KEY_SIZE) == 0
    assert taken(other, b"d" * KEY_SIZE) == 2
    other.close()
    one_way.close()


@pytest.mark.parametrize("server", [64], indirect=True)
def test_what_is_put_on_credit_finds_room_in_a_crowd(
    server: Server, client: socket.socket, pair: Pair
) -> None:
    """Their sockets have a share of its numbers: not those that a credit has been given for."""
    sender = server.client()
    fd = pair[0].fileno()
    assert put(sender, A, fd) == PUT
    one_way = open_one_way(sender)
    for _ in range(60):  # there are 16 places
        put_one_way(one_way, B, fd)
        server.clients.append(server.client())
        assert [taken(server.clients[-1], key) for key in (B, A)] == [1, 1]
        assert put(sender, A, fd) == PUT
    # Beside them 0-2, the listener, two pollers and A.
    wait_until(lambda: server.census() == 7 + 16)
    sender.close()
    one_way.close()


@needs_fuse
@pytest.mark.parametrize("server", [64], indirect=True)
def test_what_is_put_on_credit_finds_room_where_a_close_hangs(
    server: Server, client: socket.socket, folder: Path
) -> None:
    """A number is free when its close is done: until then it counts as held."""
    sender, files = server.client(), HangingFileSystem(0)
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with near, far, AsUser(0, partial(send_file, files, far), file_system=files) as process:
        assert process.hear() == "sent"
        with recv_fds(near, 1, 1).descriptors[0] as file:
            assert put(client, A, file.fileno()) == PUT
        files.hang(FLUSH, only=server.process.pid)
        assert ask(client, REMOVE + A) == (REMOVE, [])
        files.wait(FLUSH)
        one_way = None
        with open(folder / "file", "w") as other:
            while put(sender, A, other.fileno()) == PUT:
                one_way = one_way or open_one_way(sender)
                put_one_way(one_way, B, other.fileno())
                assert [taken(client, key) for key in (B, A)] == [1, 1]
            answer, _ = ask(sender, put_packet(A, 60, 1), (other.fileno(),))
            assert (answer[:1], USAGE.unpack(answer[1:])[0]) == (FULL, 24)
        server.process.kill()
    assert one_way is not None
    for sock in (sender, one_way):
        sock.close()


@pytest.mark.parametrize("server", [64], indirect=True)
def test_one_way_sockets_have_a_share(server: Server, client: socket.socket, pair: Pair) -> None:
    senders = []
    for number in range(12):  # of two sockets each; there are 16 places
        sender = server.client()
        assert put(sender, bytes([number]) * KEY_SIZE, pair[0].fileno()) == PUT
        senders += [sender, open_one_way(sender)]
        assert taken(sender, bytes([number]) * KEY_SIZE) == 1
    # Beside them 0-2, the listener and two pollers.
    wait_until(lambda: server.census() == 6 + 16)
    with pytest.raises(BrokenPipeError):
        put_one_way(senders[1], A, pair[0].fileno())  # it is told that it has to connect again
    put_one_way(senders[-1], B, pair[0].fileno())
    assert taken(senders[-2], B) == 1
    for sock in senders:
        sock.close()


def test_no_put_is_lost_while_its_client_is_dropped(pair: Pair) -> None:
    """One that comes behind the last read fails, so that the sender knows."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    reading, writing = os.pipe()
    server = Server(
        1024,
        f"""
import array, os, socket
from fdshare.parking import server
from fdshare.parking.protocol import KEY_SIZE, put_packet
sender = socket.socket(fileno={ours.fileno()})
receive = server.receive_handles
keys = iter(b"cdefg")

def put():
    key = next(keys)
    control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0]))]
    try:
        sender.sendmsg([put_packet(bytes([key]) * KEY_SIZE, 60, 1)], control)
    except BrokenPipeError:
        return
    os.write({writing}, bytes([key]))

def put_behind_each_read_that_finds_nothing(*args):
    try:
        found = receive(*args)
    except BlockingIOError:
        put()
        raise
    if not found[0]:
        put()
    return found

server.receive_handles = put_behind_each_read_that_finds_nothing
""",
        (ours.fileno(), writing),
    )
    (client,) = server.clients
    with ours, theirs, server.client() as other:
        assert put(client, A, pair[0].fileno()) == PUT
        assert ask(client, ONE_WAY, (theirs.fileno(),)) == (ONE_WAY, [])
        client.close()
        sent = os.read(reading, 1)  # it is about to drop the client
        assert taken(other, A) == 1
        os.close(writing)
        os.set_blocking(reading, False)
        with suppress(BlockingIOError):
            sent += os.read(reading, 9)
        assert [taken(other, bytes([key]) * KEY_SIZE) for key in sent] == [1] * len(sent)
    server.process.kill()
    server.process.wait()
    os.close(reading)


def test_a_connection_that_it_cannot_poll_ends_alone(pair: Pair) -> None:
    """ENOSPC: its user has max_user_watches of epoll(7)."""
    server = Server(
        1024,
        """
import errno, select
epoll = select.epoll

class FullOnce:
    registered = 0
    def __init__(self):
        self.epoll = epoll()
    def __getattr__(self, name):
        return getattr(self.epoll, name)
    def register(self, *args):
        FullOnce.registered += 1
        if FullOnce.registered == 3:  # behind the listener and the first client
            raise OSError(errno.ENOSPC, "No space left on device")
        self.epoll.register(*args)

select.epoll = FullOnce
""",
    )
    (client,) = server.clients
    assert put(client, A, pair[0].fileno()) == PUT
    with server.client() as second:
        assert second.recv(10) == b""
    with server.client() as third:
        assert taken(third, A) == 1
    client.close()
    assert server.process.wait(20) == 0


def test_one_way_sockets_that_are_none(server: Server, client: socket.socket, pair: Pair) -> None:
    fd = pair[0].fileno()
    put(client, A, fd)
    before = server.census()
    other = server.client()
    with open("/dev/null") as file:
        other.sendmsg(
            [ONE_WAY], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [file.fileno()]))]
        )
        assert other.recv(10) == b""
    with socket.socket(type=socket.SOCK_DGRAM) as datagrams, server.client() as another:
        assert ask(another, ONE_WAY, (datagrams.fileno(),)) == (ONE_WAY, [])
    one_way = open_one_way(client)
    for packet in (b"", b"x", TAKE + A, PUT * 31):
        one_way.sendmsg(
            [packet], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd, fd]))]
        )
    assert taken(client, B) == 0
    one_way.close()
    assert taken(client, B) == 0
    wait_until(lambda: server.census() == before)
    assert taken(client, A) == 1
    other.close()


def test_uses(client: socket.socket, pair: Pair) -> None:
    put(client, A, pair[0].fileno(), uses=3)
    assert [taken(client, A) for _ in range(5)] == [1, 1, 1, 0, 0]


def test_remove(client: socket.socket, pair: Pair) -> None:
    near, far = pair
    put(client, A, near.fileno())
    near.close()
    assert ask(client, REMOVE + A) == (REMOVE, [])
    assert far.recv(1) == b""
    assert ask(client, REMOVE + A) == (REMOVE, [])


def test_the_same_key_again(client: socket.socket, pair: Pair) -> None:
    """The client repeats what was not answered."""
    near, far = pair
    assert put(client, A, near.fileno()) == PUT
    assert put(client, A, far.fileno()) == PUT
    _, (fd,) = ask(client, TAKE + A)
    assert os.path.sameopenfile(fd, far.fileno())
    os.close(fd)


@pytest.mark.parametrize("server", [64], indirect=True)
def test_what_is_put_again_counts_once(server: Server, client: socket.socket, pair: Pair) -> None:
    fd = pair[0].fileno()
    for _ in range(5):
        assert put(client, A, *[fd] * 10) == PUT
    assert put(client, B, *[fd] * 14) == PUT  # there are 24 places
    assert put(client, A, *[fd] * 10) == PUT  # in those that the first attempt has
    assert put(client, A, *[fd] * 11)[:1] == FULL
    assert (taken(client, A), taken(client, B)) == (10, 14)


def test_time_to_live(client: socket.socket, pair: Pair) -> None:
    near, far = pair
    put(client, A, near.fileno(), ttl=0.05)
    put(client, B, far.fileno(), ttl=60)
    near.close()
    assert far.recv(1) == b""
    assert (taken(client, A), taken(client, B)) == (0, 1)


def test_equal_deadlines_and_removals(server: Server, client: socket.socket, pair: Pair) -> None:
    near, far = pair
    assert taken(client, A) == 0  # it has started
    before = server.census()
    keys = [bytes([number]) * KEY_SIZE for number in range(100)]
    for key in keys:
        put(client, key, near.fileno(), ttl=0.3)
    for key in keys[::2]:
        ask(client, REMOVE + key)
    near.close()
    assert far.recv(1) == b""
    wait_until(lambda: server.census() == before)


def test_time_passes_while_it_is_busy(client: socket.socket, pair: Pair) -> None:
    near, far = pair
    put(client, A, near.fileno(), ttl=0.05)
    near.close()
    far.setblocking(False)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        assert taken(client, B) == 0
        try:
            assert far.recv(1) == b""
            return
        except BlockingIOError:
            pass
    raise AssertionError("it never found time")


@pytest.mark.parametrize("server", [64], indirect=True)
def test_its_limit(server: Server, client: socket.socket, pair: Pair) -> None:
    fd = pair[0].fileno()
    assert put(client, A, *[fd] * 22) == PUT
    answer = put(client, B, *[fd] * 3)
    assert (answer[:1], USAGE.unpack(answer[1:])) == (FULL, (24, 22))
    answer = put(client, B, *[fd] * 253)  # more than it has numbers for
    assert answer[:1] == FULL
    assert put(client, B, fd, fd) == PUT
    assert taken(client, A) == 22
    assert put(client, A, *[fd] * 22) == PUT
    # At the limit of connections the client that was idle longest is dropped; what is held stays.
    for _ in range(60):
        server.clients.append(server.client())
        assert taken(server.clients[-1], b"?" * KEY_SIZE) == 0
    with pytest.raises(BrokenPipeError):
        while True:
            put(client, A, fd)
    assert (taken(server.clients[-1], A), taken(server.clients[-1], B)) == (22, 2)


def test_packets_that_are_no_requests(server: Server, client: socket.socket, pair: Pair) -> None:
    fd = pair[0].fileno()
    put(client, A, fd)
    before = server.census()
    dice = random.Random(7)
    rude = [
        b"",
        PUT,
        TAKE,
        REMOVE + A[:-1],
        TAKE + A + b"x",
        put_packet(A, 1, 1) + b"x",
        put_packet(A, 1, 1),  # and no descriptor
        b"X" + A,
        b"\0" * 4096,
        *(dice.randbytes(dice.randrange(1, 300)) for _ in range(50)),
    ]
    for packet in rude:
        for fds in ((), (fd, fd)):
            if packet[:1] == PUT and len(packet) == PUT_SIZE and fds:
                continue  # that one is in order
            other = server.client()
            control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
            other.sendmsg([packet], control if fds else [])
            assert other.recv(100) == b""
            other.close()
    assert taken(client, A) == 1
    wait_until(lambda: server.census() == before - 1)


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), -1.0, 0.0])
def test_odd_times(server: Server, client: socket.socket, pair: Pair, seconds: float) -> None:
    assert put(client, A, pair[0].fileno(), ttl=seconds)[:1] == FULL
    other = server.client()
    assert put(other, B, pair[0].fileno()) == PUT
    assert taken(other, B) == 1
    other.close()


def test_a_client_that_reads_nothing(server: Server, client: socket.socket, pair: Pair) -> None:
    other = server.client()
    other.setblocking(False)
    with pytest.raises((BlockingIOError, BrokenPipeError, ConnectionResetError)):
        while True:
            other.send(REMOVE + A)
            put(client, A, pair[0].fileno())
    other.close()
    assert put(client, A, pair[0].fileno()) == PUT
    assert taken(client, A) == 1


@AS_ROOT
def test_other_users_are_not_let_in(server: Server, client: socket.socket, pair: Pair) -> None:
    put(client, A, pair[0].fileno())
    child = os.fork()
    if not child:
        status = 1
        try:
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            stranger = server.client()
            try:
                stranger.send(TAKE + A)
                status = 0 if stranger.recv(100) == b"" else 2
            except (BrokenPipeError, ConnectionResetError):
                status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert taken(client, A) == 1


def test_it_ends(server: Server, client: socket.socket, pair: Pair) -> None:
    put(client, A, pair[0].fileno(), ttl=0.1)
    client.close()
    pidfd = os.pidfd_open(server.process.pid)
    ready, _, _ = select.select([pidfd], [], [], 20)
    os.close(pidfd)
    assert ready
    assert server.process.wait() == 0
