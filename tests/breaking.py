"""What the tests that break things share: both halves of a server, the wire by hand, the kernel's
word on identity. Used by tests/server and tests/chaos."""

from __future__ import annotations

import os
import select
import signal
import socket
import struct
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from conftest import census, wait_until

from fdshare.client.blocking.client import Client
from fdshare.errors import FdshareError
from fdshare.kernel.ancillary import receive_into, send_message
from fdshare.kernel.descriptor import Descriptor
from fdshare.kernel.endpoint import connect
from fdshare.protocol import messages as m
from fdshare.protocol.framing import Receiver, header

Half = Literal["server", "keeper"]

# What either half has open beside the table: 0-2, the listener, its lock, the owner's control
# socket, the epoll, its two ends of a wake-up pair, the journal, the pidfd of the other half, and
# the page in which followers look. The server has a second description of that, for clients.
FIXED = 12
# Of these both have all but the wake-up pair and the journal: a socket has an end in each half.
SHARED = 9


def open_of(pid: int) -> dict[int, str]:
    """A census of a half, but for the file of libffi: 3.5 and newer keep that open where ctypes is
    imported, and a successor closes it."""
    return {fd: target for fd, target in census(pid).items() if "libffi" not in target}


def identity(obj: Any) -> tuple[int, int]:
    """(st_dev, st_ino) of a descriptor, or of anything with fileno()."""
    info = os.fstat(obj if isinstance(obj, int) else obj.fileno())
    return info.st_dev, info.st_ino


def identities(pid: int) -> list[tuple[int, int]]:
    """(st_dev, st_ino) of all that *pid* has open."""
    found = []
    for number in os.listdir(f"/proc/{pid}/fd"):
        try:
            info = os.stat(f"/proc/{pid}/fd/{number}")
        except FileNotFoundError:
            continue
        found.append((info.st_dev, info.st_ino))
    return found


def state(pid: int) -> str:
    """The letter of proc_pid_stat(5); "X" for a process that is gone."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"


def has_flock(pid: int) -> bool:
    """Whether the process has a lock of flock(2) on anything; Linux."""
    with open("/proc/locks") as file:  # number, FLOCK, ADVISORY, WRITE, pid ...; waiting: `->`
        return any(words[1] == "FLOCK" and words[4] == str(pid) for words in map(str.split, file))


def waits_for_lock(pid: int) -> bool:
    """Whether the process waits for such a lock, or one of fcntl(2); Linux."""
    with open("/proc/locks") as file:
        return any(words[1] == "->" and words[5] == str(pid) for words in map(str.split, file))


def ended(pid: int) -> bool:
    """True for a process that is gone, or waits for its parent to take note."""
    return state(pid) in "XZ"


def cpu_seconds(pid: int) -> float:
    """How long *pid* has run."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident(pid: int) -> int:
    """Resident memory of *pid*, in bytes."""
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    """Kills *pid* and returns when it is dead."""
    pidfd = os.pidfd_open(pid)
    try:
        os.kill(pid, number)
        dead = select.poll()
        dead.register(pidfd, select.POLLIN)
        assert dead.poll(20_000), f"{pid} does not die"
    finally:
        os.close(pidfd)


class Halves:
    """The two processes of a server, found by asking it."""

    def __init__(self, admin: Client) -> None:
        self.admin = admin

    def pids(self) -> dict[Half, int]:
        stats = self.admin.stats()
        assert stats.keeper_pid is not None
        return {"server": stats.server_pid, "keeper": stats.keeper_pid}

    def kill(self, half: Half) -> None:
        """Kills one half, and returns when there is another one that holds everything."""
        self.redundant()
        victim = self.pids()[half]
        kill(victim)
        wait_until(lambda: self.pids()[half] != victim, f"another {half}")
        self.redundant()

    def redundant(self) -> None:
        wait_until(lambda: self.admin.stats().redundant, "both halves hold everything")

    def check_census(self) -> None:
        """Fails unless both halves have open what the table says, the same in both, and nothing
        else, soon: a thread closes."""
        for half in ("server", "keeper"):
            wait_until(lambda half=half: self.excess(half) == 0, f"the census of the {half}")
        wait_until(self.alike, "the same in both halves")

    def fixed(self) -> dict[int, str]:
        """What the keeper has open where the table is empty; fails unless it is FIXED, soon."""
        self.check_census()
        seen: list[dict[int, str]] = []

        def is_fixed() -> bool:  # at another moment than `excess` has looked
            seen.append(open_of(self.pids()["keeper"]))
            return len(seen[-1]) == FIXED

        try:
            wait_until(is_fixed, "the fixed descriptors")
        except AssertionError:
            raise AssertionError(f"more or less than {FIXED}: {seen[-1]}") from None
        return seen[-1]

    def excess(self, half: Half) -> int:
        """How many more descriptors it has open than it should; negative: fewer."""
        stats, pids = self.admin.stats(), self.pids()
        own = FIXED + stats.descriptors
        if half == "server":
            own += stats.connections + 1
        return len(open_of(pids[half])) - own

    def alike(self) -> bool:
        """Whether every descriptor of the table is open in both halves, by what it is of."""
        server, keeper = (Counter(open_of(pid).values()) for pid in self.pids().values())
        return (server & keeper).total() == SHARED + self.admin.stats().descriptors


class Said(NamedTuple):
    """A frame that came."""

    id: int
    reply: Any
    descriptors: list[Descriptor]


class Wire:
    """A client without a mind of its own: it sends what it is told, under the ids it is told."""

    def __init__(self, address: str, session: str = "", *, greet: bool = True) -> None:
        self.sock = connect(address, timeout=10)
        self.sock.settimeout(20)
        self._receiver: Receiver[Descriptor] = Receiver()
        self._said: deque[Said] = deque()
        if greet:
            self.send(0, m.Hello(m.MAGIC, m.VERSION, session))
            assert isinstance(self.receive().reply, m.Welcome)

    def send(self, id: int, request: m.Request, fds: Sequence[int] = ()) -> None:
        body = m.encode(request)
        frame = header(len(body), len(fds), id) + body
        sent = send_message(self.sock, (frame,), fds)
        if sent < len(frame):  # else the server may have hung up already
            self.sock.sendall(frame[sent:])

    def receive(self) -> Said:
        """The next frame. The caller owns its descriptors. Raises: EOFError."""
        buffer = bytearray(1 << 16)
        while not self._said:
            count, descriptors, lost = receive_into(self.sock, buffer)
            if not count:
                raise EOFError
            assert lost is None
            for frame in self._receiver.feed(memoryview(buffer)[:count], descriptors):
                reply = m.decode_reply(frame.body)
                self._said.append(Said(frame.id, reply, frame.descriptors))
        return self._said.popleft()

    def ask(self, id: int, request: m.Request, fds: Sequence[int] = ()) -> Said:
        """The answer to *request*; a refusal is raised."""
        self.send(id, request, fds)
        said = self.receive()
        assert said.id == id
        if isinstance(said.reply, m.Refused):
            raise m.refusal_error(said.reply)
        return said

    def refused(self, id: int, request: m.Request, fds: Sequence[int] = ()) -> FdshareError:
        """The refusal of *request*, which must be one."""
        self.send(id, request, fds)
        said = self.receive()
        assert said.id == id
        assert isinstance(said.reply, m.Refused)
        return m.refusal_error(said.reply)

    def close(self) -> None:
        self.sock.close()
        for said in self._said:
            for descriptor in said.descriptors:
                descriptor.close()
        for descriptor in self._receiver.drain():
            descriptor.close()

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def connected_pair() -> tuple[socket.socket, socket.socket]:
    """Two connected TCP sockets, which have an address each."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    return near, far


def lingering_pair(seconds: int) -> tuple[socket.socket, socket.socket]:
    """A TCP socket whose last close(2) takes *seconds*, and its peer, which can `reset` it."""
    with socket.socket() as listener:
        # Small buffers, and a peer that never reads: what is sent stays unsent.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        sock = socket.create_connection(listener.getsockname())
        peer, _ = listener.accept()
    sock.setblocking(False)
    try:
        while True:
            sock.send(b"unsent" * 10_000)
    except BlockingIOError:
        pass
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, seconds))
    # With O_NONBLOCK close(2) would not wait; the flag is the description's, and so is this.
    sock.setblocking(True)
    return sock, peer


def reset(peer: socket.socket) -> None:
    """Closes *peer* with a RST: nobody waits for it any more."""
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()


def leave_unread(address: str, pid: int, sock: socket.socket) -> None:
    """Gives the server *pid* the last copy of *sock* where it never reads it: behind bytes that
    end the connection."""
    with Wire(address) as wire, sock:
        wire.sock.settimeout(None)  # or Python asks poll(2) first, for which there is no room
        os.kill(pid, signal.SIGSTOP)
        wire.sock.sendall(b"\xff" * 70_000)
        send_message(wire.sock, (b"x",), [sock.fileno()])
    os.kill(pid, signal.SIGCONT)
