"""The private server of a process tree: who starts it, who finds it, when it ends."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from breaking import open_of
from conftest import wait_until
from kernel.pairs import Refusing, make_zero  # noqa: F401
from users import as_user, needs_root

from fdshare.errors import (
    AlreadyTaken,
    DescriptorLimit,
    DescriptorRefused,
    ServerGone,
    ServerTimeout,
)
from fdshare.kernel.credentials import peer_credentials
from fdshare.kernel.descriptor import Descriptor
from fdshare.kernel.endpoint import connect
from fdshare.kernel.passing import recv_fds
from fdshare.parking import client as module
from fdshare.parking.client import PrivateServer
from fdshare.parking.private_address import new_address
from fdshare.parking.protocol import CREDIT, PUT, PUT_SIZE
from fdshare.parking.server import serve

Pair = tuple[socket.socket, socket.socket]
KEY = b"k" * 18
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")


@pytest.fixture
def private() -> Iterator[PrivateServer]:
    server = PrivateServer(new_address())
    yield server
    server.close()


def gone(pidfd: int) -> bool:
    """True once the process of *pidfd*, which it closes, has ended."""
    ready, _, _ = select.select([pidfd], [], [], 20)
    os.close(pidfd)
    return bool(ready)


def pid_of(server: PrivateServer) -> int:
    """Who listens there: the kernel's answer. Only once it has answered somebody."""
    with connect(server.address, timeout=10, kind=socket.SOCK_SEQPACKET) as sock:
        return peer_credentials(sock).pid


def test_a_process_of_its_own(private: PrivateServer, pair: Pair) -> None:
    private.put(KEY, [pair[0].fileno()], 60, 1)
    pid = pid_of(private)
    assert os.getsid(pid) == pid
    assert os.getsid(pid) != os.getsid(0)
    with open(f"/proc/{pid}/stat") as file:
        parent = int(file.read().rpartition(")")[2].split()[1])
    assert parent != os.getpid()
    assert [open_of(pid)[number] for number in range(3)] == ["/dev/null"] * 3
    # Two listeners, two pollers, our connection, and what it keeps: nothing of ours came along.
    wait_until(lambda: len(open_of(pid)) == 3 + 6)
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    private.take_back(KEY)


def test_it_ends_with_its_last_user(private: PrivateServer, pair: Pair) -> None:
    private.put(KEY, [pair[0].fileno()], 60, 1)
    pidfd = os.pidfd_open(pid_of(private))
    private.take(KEY)[0].close()
    private.close()
    assert gone(pidfd)
    assert not os.path.exists(os.path.dirname(private.address))


def test_it_stays_while_something_is_kept(private: PrivateServer, pair: Pair) -> None:
    code = f"""
import socket
from fdshare.parking.client import PrivateServer
near, far = socket.socketpair()
far.sendall(b"legacy")
PrivateServer({private.address!r}).put({KEY!r}, [near.fileno()], 60, 1)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    pidfd = os.pidfd_open(pid_of(private))
    (descriptor,) = private.take(KEY)
    with descriptor.socket() as arrived:
        assert arrived.recv(10) == b"legacy"
    private.close()
    assert gone(pidfd)


def test_it_ends_when_the_time_has_passed(private: PrivateServer, pair: Pair) -> None:
    near, far = pair
    private.put(KEY, [near.fileno()], 0.3, 1)
    pidfd = os.pidfd_open(pid_of(private))
    private.close()
    near.close()
    assert far.recv(1) == b""
    assert gone(pidfd)
    with pytest.raises(AlreadyTaken):
        private.take(KEY)


def test_no_zombie_is_left(private: PrivateServer) -> None:
    code = f"""
import os
from fdshare.parking.client import PrivateServer
server = PrivateServer({private.address!r})
server.put({KEY!r}, [0], 60, 1)
try:
    os.waitpid(-1, os.WNOHANG)
except ChildProcessError:
    print("no child")
server.take_back({KEY!r})
"""
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, timeout=60, capture_output=True, text=True
    )
    assert done.stdout == "no child\n"


@pytest.mark.parametrize("closed", [(0,), (0, 1), (0, 1, 2)], ids=str)
def test_a_daemon_without_standard_descriptors_starts_it(
    private: PrivateServer, closed: tuple[int, ...]
) -> None:
    """The listeners get their numbers."""
    code = f"""
import os, socket
from fdshare.parking.client import PrivateServer
near, far = socket.socketpair()
for number in {closed!r}:
    os.close(number)
server = PrivateServer({private.address!r})
server.put({KEY!r}, [near.fileno()], 60, 1)
(descriptor,) = server.take({KEY!r})
os._exit(not os.path.sameopenfile(descriptor.fileno(), near.fileno()))
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    wait_until(lambda: not os.path.exists(os.path.dirname(private.address)))  # it has ended


def test_many_at_once_start_one(private: PrivateServer, pair: Pair) -> None:
    code = f"""
import socket, sys
from fdshare.parking.client import PrivateServer
from fdshare.kernel.endpoint import connect
from fdshare.kernel.credentials import peer_credentials
server = PrivateServer({private.address!r})
print(flush=True)
sys.stdin.readline()
key = sys.argv[1].encode() * 18
server.put(key, [0], 60, 1)
with connect(server.address, kind=socket.SOCK_SEQPACKET) as sock:
    print(peer_credentials(sock).pid, flush=True)
sys.stdin.readline()
assert len(server.take(key)) == 1
"""
    starters = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", code, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in "abcdef"
    ]
    for starter in starters:
        assert starter.stdout is not None
        starter.stdout.readline()
    for starter in starters:
        assert starter.stdin is not None
        starter.stdin.write("\n")
        starter.stdin.flush()
    pids = {starter.stdout.readline() for starter in starters if starter.stdout}
    for starter in starters:
        starter.communicate("\n", timeout=60)
        assert starter.returncode == 0
    assert len(pids) == 1


def test_killed_it_is_started_anew(private: PrivateServer, pair: Pair) -> None:
    fds = [pair[0].fileno()]
    private.put(KEY, fds, 60, 1)
    first = pid_of(private)
    pidfd = os.pidfd_open(first)
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    os.close(pidfd)
    with pytest.raises(AlreadyTaken):
        while True:  # it may still be there when the first one comes
            private.take(KEY)[0].close()
    private.put(KEY, fds, 60, 1)
    assert pid_of(private) != first
    private.take(KEY)[0].close()


def use_four_at_once(private: PrivateServer) -> None:
    """Leaves as many idle connections as are kept, as four threads do."""
    for connection in [private._borrow(start=True) for _ in range(4)]:
        private._give_back(connection)
    assert len(private._idle) == 4


def test_killed_it_is_started_anew_whatever_was_connected(
    private: PrivateServer, pair: Pair
) -> None:
    fds = [pair[0].fileno()]
    use_four_at_once(private)
    private.put(KEY, fds, 60, 1)
    pidfd = os.pidfd_open(pid_of(private))
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    assert gone(pidfd)
    private.put(KEY, fds, 60, 1)
    private.take(KEY)[0].close()


@pytest.mark.parametrize("verb", ["put", "take", "take_back"])
def test_dropped_for_being_idle_it_connects_again(
    private: PrivateServer, pair: Pair, verb: str
) -> None:
    other = PrivateServer(private.address)
    other.put(KEY, [pair[0].fileno()], 60, 1)
    use_four_at_once(private)
    for connection in private._idle:
        connection.sock.shutdown(socket.SHUT_RDWR)
    if verb == "put":
        private.put(KEY, [pair[0].fileno()], 60, 1)
    elif verb == "take":
        private.take(KEY)[0].close()
    else:
        private.take_back(KEY)
    other.take_back(KEY)
    other.close()


CLONE_NEWNET, CLONE_NEWNS = 0x40000000, 0x20000


@AS_ROOT
@pytest.mark.parametrize("where", ["network", "mount", "root"])
def test_a_child_in_another_namespace(
    private: PrivateServer, pair: Pair, folder: Path, where: str
) -> None:
    """It finds the server by the path, or by the abstract name."""
    private.put(KEY, [pair[0].fileno()], 60, 1)
    server = pid_of(private)
    child = os.fork()
    if not child:
        status = 1
        try:
            libc = ctypes.CDLL(None, use_errno=True)
            if where == "root":
                os.chroot(folder)
            elif libc.unshare(CLONE_NEWNET if where == "network" else CLONE_NEWNS):
                os._exit(77)
            elif where == "mount":
                assert not libc.mount(None, b"/", None, 0x44000, None)  # MS_REC | MS_PRIVATE
                over = os.path.dirname(os.path.dirname(private.address))
                assert not libc.mount(b"none", over.encode(), b"tmpfs", 0, None)
            for descriptor in private.take(KEY):
                private.put(b"2" * 18, [descriptor.fileno()], 60, 1)
            status = 0
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == 77:
        pytest.skip("unshare(2) is not allowed here")
    assert status == 0
    (descriptor,) = private.take(b"2" * 18)
    assert os.path.sameopenfile(descriptor.fileno(), pair[0].fileno())
    descriptor.close()
    assert pid_of(private) == server


@needs_root
def test_a_process_that_became_another_user_is_told_so(private: PrivateServer, pair: Pair) -> None:
    """A worker that drops its rights: the server is not for it, and it does not try for ever."""
    private.put(KEY, [pair[0].fileno()], 60, 1)
    for use in (
        lambda: private.take(KEY),
        lambda: private.take_back(KEY),
        lambda: private.put(b"2" * 18, [pair[0].fileno()], 60, 1),
    ):
        said = as_user(65534, use)
        assert said.startswith("UntrustedServer: ")
        assert "runs as uid 0, and a private server is for its own user" in said
    private.take(KEY)[0].close()


def test_a_server_that_ends_each_connection_is_not_asked_for_ever(pair: Pair, folder: Path) -> None:
    address = str(folder / "sock")
    private = PrivateServer(address)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(address)
        listener.listen()

        def turn_away() -> None:
            with suppress(OSError):  # of shutdown(2)
                while True:
                    listener.accept()[0].close()

        thread = threading.Thread(target=turn_away)
        thread.start()
        try:
            for use in (
                lambda: private.take_back(KEY),
                lambda: private.put(KEY, [pair[0].fileno()], 60, 1),
            ):
                with pytest.raises(ServerGone):
                    use()
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(30)
    private.close()


def test_nothing_is_put_one_way_on_a_connection_that_ends(pair: Pair, folder: Path) -> None:
    """Whoever has the other end may have read it for the last time."""
    address = str(folder / "sock")
    private = PrivateServer(address)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(address)
        listener.listen()
        ends: list[Descriptor] = []

        def end_when_asked_for_a_one_way_socket() -> None:
            with suppress(OSError):  # of shutdown(2)
                while True:
                    with listener.accept()[0] as sock:
                        while (got := recv_fds(sock, PUT_SIZE, 1)).data[:1] == PUT:
                            got.close()
                            sock.send(PUT + CREDIT.pack(8))
                        ends.extend(got.descriptors)

        thread = threading.Thread(target=end_when_asked_for_a_one_way_socket)
        thread.start()
        try:
            for _ in range(2):  # the second one finds a credit
                private.put(KEY, [pair[0].fileno()], 60, 1)
        finally:
            private.close()
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(30)
        (end,) = ends
        with end.socket() as one_way:
            assert one_way.recv(1) == b""


@pytest.mark.usefixtures("signalled")
def test_one_that_does_not_answer_is_not_waited_for_without_limit(
    pair: Pair, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while signals come, after each of which Python reads again."""
    monkeypatch.setattr(module, "_TIMEOUT", 0.2)
    address = str(folder / "sock")
    private = PrivateServer(address)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(address)
        listener.listen()
        for use in (
            lambda: private.put(KEY, [pair[0].fileno()], 60, 1),
            lambda: private.take(KEY),
            lambda: private.take_back(KEY),
        ):
            with pytest.raises(ServerTimeout):
                use()
    private.close()


def test_a_forked_child_has_connections_of_its_own(private: PrivateServer, pair: Pair) -> None:
    near, far = pair
    private.put(KEY, [near.fileno()], 60, 1)
    child = os.fork()
    if not child:
        status = 1
        try:
            assert not private._idle
            with private.take(KEY)[0].socket() as arrived:
                arrived.sendall(b"child")
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert far.recv(10) == b"child"
    with pytest.raises(AlreadyTaken):
        private.take(KEY)


def test_full_it_says_so(private: PrivateServer, pair: Pair) -> None:
    """Its own limit: 64 descriptors, of which 24 are for what it keeps."""
    code = f"""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
from fdshare.parking.client import PrivateServer
PrivateServer({private.address!r}).put({KEY!r}, [0], 60, 1)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    with pytest.raises(DescriptorLimit) as caught:
        private.put(b"2" * 18, [pair[0].fileno()] * 24, 60, 1)
    assert (caught.value.whose, caught.value.limit, caught.value.used) == ("server", 24, 1)
    assert caught.value.errno == errno.EMFILE
    private.put(b"2" * 18, [pair[0].fileno()] * 23, 60, 1)
    with pytest.raises(DescriptorLimit):  # more than it can even receive
        private.put(b"3" * 18, [pair[0].fileno()] * 200, 60, 1)
    # Nothing is lost, and idle clients make room for new ones.
    others = [PrivateServer(private.address) for _ in range(60)]
    for other in others:
        with pytest.raises(AlreadyTaken):
            other.take(b"4" * 18)
    arrived = private.take(b"2" * 18)
    assert len(arrived) == 23
    for descriptor in arrived:
        descriptor.close()
    private.take_back(KEY)
    for other in others:
        other.close()


def test_at_the_limit_of_the_receiver_nothing_is_lost(private: PrivateServer, pair: Pair) -> None:
    private.put(KEY, [pair[0].fileno()] * 20, 60, 1)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = set(map(int, os.listdir("/proc/self/fd")))
    free = [number for number in range(len(used) + 10) if number not in used]
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[5], limits[1]))
    try:
        with pytest.raises(DescriptorLimit) as caught:
            private.take(KEY)
        assert caught.value.whose == "receiver"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    arrived = private.take(KEY)
    assert len(arrived) == 20
    for descriptor in arrived:
        assert not os.get_inheritable(descriptor.fileno())
        descriptor.close()


def test_what_a_security_module_refuses(private: PrivateServer, pair: Pair, zero: int) -> None:
    private.put(KEY, [pair[0].fileno(), zero], 60, 1)
    (connection,) = private._idle
    with connection.sock:
        connection.sock = Refusing(connection.sock)
    with pytest.raises(DescriptorRefused):
        private.take(KEY)
    with pytest.raises(AlreadyTaken):
        private.take(KEY)


def test_at_the_limit_of_the_sender_it_puts_what_it_has(private: PrivateServer, pair: Pair) -> None:
    """A one-way socket would be two descriptors more; to put with an answer needs none."""
    fds = [pair[0].fileno()]
    private.put(KEY, fds, 60, 1)  # connected, and it may open one
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        for number in range(3):
            private.put(bytes([number]) * 18, fds, 60, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    for number in range(3):
        private.take(bytes([number]) * 18)[0].close()
    private.take_back(KEY)


def test_many_threads(private: PrivateServer, pair: Pair) -> None:
    fds = [pair[0].fileno()]
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(100):
                key = bytes([number, turn]) * 9
                private.put(key, fds * (1 + turn % 7), 60, 1 + turn % 2)
                for _ in range(1 + turn % 2):
                    arrived = private.take(key)
                    assert len(arrived) == 1 + turn % 7
                    for descriptor in arrived:
                        descriptor.close()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(private._idle) <= 4


@AS_ROOT
@pytest.mark.parametrize("one_way", [True, False], ids=["with a one-way socket", "without one"])
def test_more_in_flight_than_the_sender_may_have(
    private: PrivateServer, pair: Pair, one_way: bool
) -> None:
    """The kernel counts what waits unread against the sender's user, except root."""
    private.put(KEY, [pair[0].fileno()], 60, 1)  # all is imported now
    private.take(KEY)[0].close()
    child = os.fork()
    if not child:
        status = 1
        try:
            # A uid that nobody else uses, for it is counted for the user, not the process.
            os.setresgid(61235, 61235, 61235)
            os.setresuid(61235, 61235, 61235)
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            name = os.urandom(16).hex()
            listener.bind(f"\0{name}")
            listener.listen()
            if not os.fork():
                serve([listener.detach()], "@test")
                os._exit(0)
            listener.close()
            _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            mine = PrivateServer(f"@{name}")
            if not one_way:  # it would open one with its next put, but others have filled theirs
                others = [PrivateServer(f"@{name}") for _ in range(4)]
                for server in (mine, *others):
                    server.put(KEY, [0], 60, 1)
                for number, server in enumerate(others):
                    server.put(b"%18d" % number, [0] * server._idle[0].credit, 60, 1)
                used = set(map(int, os.listdir("/proc/self/fd")))
                free = [number for number in range(len(used) + 10) if number not in used]
                resource.setrlimit(resource.RLIMIT_NOFILE, (free[4], hard))
            for number in range(100):
                mine.put(bytes([number + 1]) * 18, [pair[0].fileno()] * 3, 60, 1)
                if number == 2 and one_way:
                    resource.setrlimit(resource.RLIMIT_NOFILE, (8, hard))
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            for number in range(100):
                for descriptor in mine.take(bytes([number + 1]) * 18):
                    descriptor.close()
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
