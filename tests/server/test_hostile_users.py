"""What a user who may do little, or nothing but connect, does to stop the others: it does not."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import resource
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
from breaking import Half, Halves, Wire, connected_pair, ended, kill, lingering_pair
from conftest import census, wait_until
from hanging import FLUSH, LOOKUP, READ, HangingFileSystem, needs_fuse
from users import ANYBODY, AsUser, Say, as_user, needs_root

from fdshare.client.blocking.client import Client
from fdshare.errors import FdshareError
from fdshare.kernel.ancillary import send_message
from fdshare.kernel.endpoint import connect
from fdshare.manager import Manager
from fdshare.protocol import messages as m
from fdshare.protocol.framing import header
from fdshare.server.serve import serve
from fdshare.server.settings import Settings

pytestmark = needs_root
KIND = m.Kind("fd", msgspec.Raw(m.encode({})))
HOSTILE, GOOD = 1501, 1502
# No other test has processes of this user, which RLIMIT_NPROC counts, nor has another run.
ALONE = 20_000 + os.getpid() % 40_000
RULES = f"""
[[rule]]
effect = "allow"
verbs = ["register", "fetch", "take", "unregister", "info"]
users = [{HOSTILE}]
names = ["a/*"]
[[rule]]
effect = "allow"
verbs = ["register", "fetch", "take", "unregister", "info"]
users = [{GOOD}]
names = ["b/*"]
"""


@pytest.fixture
def root(folder: Path, small: Callable[..., Client]) -> Client:
    """A client of a server with few descriptors, in which these rules hold."""
    folder.chmod(0o755)
    (folder / "policy").write_text(RULES)
    root = small(1024, "--policy", str(folder / "policy"), "--mode", "0666")
    root.register("root's", 0)
    return root


def check(root: Client) -> None:
    """Root and another user do what they may."""
    root.fetch_raw("root's")[0].close()
    root.register("root's", 0, replace=True)

    def use() -> str:
        with Client(root.address, timeout=10) as client:
            client.register("b/1", 0)
            client.fetch_raw("b/1")[0].close()
            client.info("b/1")
            client.take_raw("b/1")[0].close()
            return "good"

    assert as_user(GOOD, use) == "good"


class Census:
    """What both halves have open but for connections and the table: as much as at first."""

    def __init__(self, root: Client) -> None:
        self.halves = Halves(root)
        self._wait_until_alone()
        self.settle(root)
        self.before = self.excess()

    def settle(self, root: Client) -> None:
        """Returns when the keeper has read what the server wrote: records come in order."""
        marker = os.memfd_create("settled")
        root.register("settled", marker)
        os.close(marker)
        keeper = self.halves.pids()["keeper"]
        wait_until(lambda: any("settled" in target for target in census(keeper).values()))
        root.unregister("settled")
        wait_until(lambda: not any("settled" in target for target in census(keeper).values()))

    def excess(self) -> tuple[int, int]:
        return self.halves.excess("server"), self.halves.excess("keeper")

    def _wait_until_alone(self) -> None:
        wait_until(lambda: self.halves.admin.stats().connections == 1, "the others to be gone")

    def check(self) -> None:
        self._wait_until_alone()
        wait_until(lambda: self.excess() == self.before, "the census")


def half_frame(sock: socket.socket, fds: list[int]) -> None:
    send_message(sock, (header(1000, len(fds), 1) + b"x",), fds)


def test_half_frames(root: Client) -> None:
    """Their descriptors count against who sent them, and all of them are closed in the end."""
    limits = root.stats().limits

    def attack(say: Say) -> list[socket.socket]:
        socks = [connect(root.address) for _ in range(20)]
        for sock in socks:
            half_frame(sock, [0] * 253)
        say("sent")
        return socks

    census = Census(root)
    with AsUser(HOSTILE, attack) as hostile:
        assert hostile.hear() == "sent"
        check(root)
        most = census.before[0] + limits["max_open_per_uid"]
        wait_until(lambda: census.excess()[0] <= most)
    census.check()


def test_leases_count_against_the_taker(root: Client) -> None:
    most = int(root.stats().limits["max_descriptors_per_uid"])

    def attack(say: Say) -> list[Any]:
        wire = Wire(root.address, "hostile")
        for index in range(most // 2):
            wire.ask(index + 1, m.Register(f"a/{index}", KIND), [0, 0])
        # What is taken frees two descriptors, but not before the lease is over.
        taken = [wire.ask(1000 + i, m.Take(f"a/{i}", 0.0)) for i in range(2)]
        say(wire.refused(2000, m.Take("a/2", 0.0)))
        return [wire, taken]

    with AsUser(HOSTILE, attack) as hostile:
        assert "max_descriptors_per_uid" in hostile.hear()
        check(root)


def test_sockets_that_linger(root: Client) -> None:
    """What others let go of is closed, and so are these: SO_LINGER is taken from them."""
    census = Census(root)

    def attack(say: Say) -> object:
        peers = []
        with Wire(root.address, "hostile") as wire:
            for id in range(1, 100):
                sock, peer = lingering_pair(86400)
                peers.append(peer)
                wire.refused(id, m.Register("not mine", KIND), [sock.fileno()])
                os.close(sock.detach())  # the server's copy is the last
        say("sent")
        return peers

    with AsUser(HOSTILE, attack) as hostile:
        assert hostile.hear() == "sent"
        check(root)
        listener = socket.create_server(("127.0.0.1", 0))
        address = listener.getsockname()
        root.register("listener", listener)
        listener.close()
        root.unregister("listener")
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address)
    census.check()


def test_a_message_that_does_not_fit(root: Client) -> None:
    """There are fewer numbers free than it has descriptors, and the close of those blocks."""

    def attack(say: Say) -> object:
        fill = [connect(root.address) for _ in range(4)]
        for sock, count in zip(fill, (253, 253, 253, 180), strict=True):
            with suppress(BrokenPipeError, ConnectionResetError):
                half_frame(sock, [0] * count)
        kept: list[Any] = [fill]
        for _ in range(5):
            sock = connect(root.address)
            linger, peer = lingering_pair(86400)
            with suppress(BrokenPipeError, ConnectionResetError):  # dropped, for it has too many
                half_frame(sock, [linger.fileno()] * 200)
            os.close(linger.detach())
            kept += [sock, peer]
        say("sent")
        return kept

    with AsUser(HOSTILE, attack) as hostile:
        assert hostile.hear() == "sent"
        for _ in range(20):
            root.fetch_raw("root's")[0].close()
            root.register("root's", 0, replace=True)


@needs_fuse
@pytest.mark.parametrize("kept", [True, False])
def test_a_file_system_that_hangs(root: Client, kept: bool) -> None:
    """Its files are asked at every close(2). Those of one user hang that one's closes alone."""
    census = Census(root)
    files = HangingFileSystem(HOSTILE)

    def attack(say: Say) -> object:
        file = files.open()
        wire = Wire(root.address, "hostile")
        if kept:
            wire.ask(1, m.Register("a/1", KIND), [file])
        files.hang(FLUSH)
        if kept:
            wire.ask(2, m.Unregister("a/1"))
        else:
            wire.refused(2, m.Register("not mine", KIND), [file])
        say("hangs")
        for id in range(3, 1000):
            with suppress(BrokenPipeError):  # its last word is still to be read
                wire.send(id, m.Register("not mine", KIND), [0])
            said = wire.receive()
            if said.id == 0:
                say(said.reply.message)
                break
        return wire, file

    with AsUser(HOSTILE, attack, file_system=files) as hostile:
        assert hostile.hear() == "hangs"
        check(root)
        assert "max_open_per_uid" in hostile.hear()
        check(root)
        for pid in census.halves.pids().values():
            assert len(os.listdir(f"/proc/{pid}/task")) < 8
    census.check()


@needs_fuse
@pytest.mark.parametrize("lifetime", ["server", "connection"])
def test_a_socket_that_a_send_keeps_busy(root: Client, folder: Path, lifetime: m.Lifetime) -> None:
    """A send(2) that waits for a page holds the lock of its TCP socket, for which getsockname(2)
    waits, whoever asks: that keeps the lane of its user waiting, and nobody else."""
    files = HangingFileSystem(HOSTILE)

    def attack(say: Say) -> object:
        near, far = connected_pair()
        page = mmap.mmap(files.open(), 4096, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
        wire = Wire(root.address, "hostile")
        files.hang(READ)
        threading.Thread(target=near.send, args=(page,), daemon=True).start()
        files.wait(READ)
        request = m.Register("a/1", KIND, lifetime=lifetime, drop_on_hangup=True)
        said = wire.ask(1, request, [near.fileno()] * (1 + (lifetime == "connection")))
        assert isinstance(said.reply, m.Registered)
        say(said.reply.generation)
        return wire, near, far

    with AsUser(HOSTILE, attack, file_system=files) as hostile:
        generation = int(hostile.hear())
        check(root)
        Halves(root).kill("server")
        check(root)
        (info,) = root.infos("a/1")
        assert info.descriptors[0].health == "its file system does not answer"
        check(root)
        with Wire(root.address) as wire:
            bind = m.Bind("a/1", f"unix://{folder}/b", replaces=generation)
            for descriptor in wire.ask(1, bind).descriptors:
                descriptor.close()
        check(root)  # while both halves close the former one
        Halves(root).kill("keeper")
        check(root)


@needs_fuse
def test_a_process_whose_memory_is_busy(root: Client) -> None:
    """A read of a page holds its mmap_lock and a new map waits for that: nobody reads its memory,
    where its arguments are."""
    server = Halves(root).pids()["server"]
    files = HangingFileSystem(HOSTILE)

    def attack(say: Say) -> None:
        page = mmap.mmap(files.open(), 4096, flags=mmap.MAP_PRIVATE)
        place = ctypes.addressof(ctypes.c_char.from_buffer(page))
        memory, wire, me = os.open("/proc/self/mem", os.O_RDONLY), Wire(root.address), os.getpid()
        files.hang(READ)
        if not os.fork():
            try:
                wait_until(lambda: state_of(me) == "D", "the map")
                wire.ask(1, m.Register("a/1", KIND), [memory])
                say("registered")
            finally:
                os._exit(0)
        threading.Thread(target=os.pread, args=(memory, 4096, place), daemon=True).start()
        files.wait(READ)
        mmap.mmap(-1, 1 << 24)

    with AsUser(HOSTILE, attack, file_system=files) as hostile:
        assert hostile.hear() == "registered"
        check(root)
        assert Halves(root).pids()["server"] == server


def state_of(pid: int) -> str:
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]


@needs_fuse
def test_closes_that_hang_in_the_keeper_alone(root: Client) -> None:
    """The server has closed what its user removed, and the keeper cannot: that user gets no more
    numbers of the keeper's than it may have, and nobody else gets less."""
    census = Census(root)
    files = HangingFileSystem(HOSTILE)
    keeper = census.halves.pids()["keeper"]

    def attack(say: Say) -> object:
        file = files.open()
        wire = Wire(root.address, "hostile")
        wire.ask(1, m.Register("a/1", KIND), [file])
        files.hang(FLUSH, only=keeper)
        wire.ask(2, m.Unregister("a/1"))
        say("hangs")
        with suppress(FdshareError, AssertionError):  # refused
            for id in range(3, 3000, 2):
                wire.ask(id, m.Register("a/1", KIND), [0])
                wire.ask(id + 1, m.Unregister("a/1"))
        say("refused")
        return wire, file

    with AsUser(HOSTILE, attack, file_system=files) as hostile:
        assert hostile.hear() == "hangs"
        check(root)
        assert hostile.hear(60) == "refused"
        check(root)
        assert "hangs" in root.stats().notes[f"uid {HOSTILE}"]
        assert census.excess()[1] <= census.before[1] + root.stats().limits["max_open_per_uid"]
        assert census.halves.pids()["keeper"] == keeper
    census.check()


@needs_fuse
@pytest.mark.parametrize("count", [0, 3])
def test_who_connects_again_while_a_close_hangs(root: Client, count: int) -> None:
    """More connections than the server has numbers, each closed with something unread in it: of
    a client that tries again and again, or with descriptors. They wait for the user's closes."""
    census = Census(root)
    files = HangingFileSystem(HOSTILE)

    def attack(say: Say) -> object:
        file = files.open()
        wire = Wire(root.address, "hostile")
        files.hang(FLUSH)
        wire.refused(2, m.Register("not mine", KIND), [file])
        hello = m.encode(m.Hello(m.MAGIC, m.VERSION, ""))
        for _ in range(1500):
            with connect(root.address, timeout=10) as sock, suppress(OSError):
                send_message(sock, (header(len(hello), count, 0) + hello,), [0] * count)
                sock.sendall(bytes(100))
        say("connected")
        return wire, file

    with AsUser(HOSTILE, attack, file_system=files) as hostile:
        assert hostile.hear(60) == "connected"
        check(root)
        most = root.stats().limits["max_open_per_uid"] if count else 0
        wait_until(lambda: census.excess()[0] <= census.before[0] + most + 20)
        assert "hangs" in root.stats().notes[f"uid {HOSTILE}"]
    census.check()


@contextmanager
def closes_that_hang(root: Client) -> Iterator[None]:
    """Four users register all they may, and remove it when their file systems do not answer."""

    def attack(uid: int, files: HangingFileSystem, say: Say) -> object:
        file = files.open()
        wire = Wire(root.address, str(uid))
        wire.ask(1, m.Register(f"{uid}/file", KIND), [file])
        held = []
        with suppress(FdshareError, AssertionError):  # refused, or told that it is not heard
            for id in range(2, 400):
                wire.ask(id, m.Register(f"{uid}/{id}", KIND), [0] * 5)
                held.append(f"{uid}/{id}")
        files.hang(FLUSH)
        wire = Wire(root.address, f"{uid} again")
        for id, name in enumerate([f"{uid}/file", *held], 1):
            wire.ask(id, m.Unregister(name))
        say(len(held))
        return wire, file

    systems = {uid: HangingFileSystem(uid) for uid in (1501, 1503, 1504, 1505)}
    with ExitStack() as others:
        for uid, files in systems.items():
            hostile = AsUser(uid, partial(attack, uid, files), file_system=files)
            assert int(others.enter_context(hostile).hear()) > 10
        yield


def check_room(root: Client) -> None:
    """As `check`; and there are more than a few numbers."""
    with Client(root.address) as client, Wire(root.address, "many") as wire:
        check(client)
        wire.ask(1, m.Register("many", KIND, replace=True), [0] * 20)


@needs_fuse
@pytest.mark.parametrize("options", [(), ("--no-keeper",)], ids=" ".join)
def test_users_whose_closes_hang(
    folder: Path, small: Callable[..., Client], options: tuple[str, ...]
) -> None:
    """What each of them removes stays open: it counts against them as if it was not removed."""
    folder.chmod(0o755)
    (folder / "policy").write_text(ANYBODY)
    root = small(1024, "--policy", str(folder / "policy"), "--mode", "0666", *options)
    root.register("root's", 0)
    server = root.stats().server_pid
    before = len(census(server))
    with closes_that_hang(root):
        check_room(root)
    for name in root.names():
        if name != "root's":
            root.unregister(name)
    wait_until(lambda: len(census(server)) == before, "what hung to be closed")


@needs_fuse
@pytest.mark.parametrize("half", ["server", "keeper"])
def test_a_half_that_is_made_while_closes_hang(
    folder: Path, small: Callable[..., Client], half: Half
) -> None:
    """It has copies of what is still to be closed, and they count as before."""
    folder.chmod(0o755)
    (folder / "policy").write_text(ANYBODY)
    root = small(1024, "--policy", str(folder / "policy"), "--mode", "0666")
    root.register("root's", 0)
    victim = Halves(root).pids()[half]
    with closes_that_hang(root):
        os.kill(victim, signal.SIGKILL)  # it hangs in its end
        with Client(root.address, timeout=20) as client:
            halves = Halves(client)
            wait_until(lambda: halves.pids()[half] != victim, f"another {half}")
            halves.redundant()
        check_room(root)


@pytest.fixture
def hanging(root: Client) -> Iterator[HangingFileSystem]:
    """A hostile user's file system that answers no close(2) any more; `root`'s server holds a file
    of it."""
    files = HangingFileSystem(HOSTILE)

    def register(say: Say) -> object:
        file = files.open()
        with Wire(root.address, "hostile") as wire:
            wire.ask(1, m.Register("a/1", KIND), [file])
        files.hang(FLUSH)
        say("registered")
        return file

    with AsUser(HOSTILE, register, file_system=files) as hostile:
        assert hostile.hear() == "registered"
        yield files


@needs_fuse
@pytest.mark.parametrize("half", ["server", "keeper"])
def test_a_half_that_hangs_in_its_end(root: Client, hanging: HangingFileSystem, half: Half) -> None:
    """Killed, it cannot close what it holds. The other goes on without it, and says so."""
    halves = Halves(root)
    halves.redundant()
    victim = halves.pids()[half]
    os.kill(victim, signal.SIGKILL)
    # Its clients hear nothing, not even the end of their connections: they connect anew.
    with Client(root.address, timeout=20) as client:
        halves = Halves(client)
        wait_until(lambda: halves.pids()[half] != victim, f"another {half}")
        halves.redundant()
        check(client)
        assert half in client.stats().notes[f"pid {victim}"]
        assert client.stats().dying == 1
        hanging.close()
        wait_until(lambda: not client.stats().dying, "its end")
        assert f"pid {victim}" not in client.stats().notes
        assert client.names() == ["a/1", "root's"]


@needs_fuse
def test_an_upgrade_beside_a_file_system_that_hangs(
    root: Client, hanging: HangingFileSystem
) -> None:
    """New code is tried without a copy of its file, and the old server hangs in its end alone."""
    before = Halves(root).pids()
    root.upgrade()
    after = Halves(root).pids()
    assert after["keeper"] == before["keeper"]
    assert after["server"] != before["server"]
    check(root)
    assert root.names() == ["a/1", "root's"]


@needs_fuse
def test_an_upgrade_while_a_close_hangs(root: Client, hanging: HangingFileSystem) -> None:
    """A process with a thread that never returns cannot exec. It says so, and nothing changes."""
    root.unregister("a/1")
    notes = root.stats().notes
    assert "hangs" in notes[f"uid {HOSTILE}"]
    with pytest.raises(FdshareError, match=r"close\(2\) hangs"):
        root.upgrade()
    check(root)


@needs_fuse
@pytest.mark.parametrize("closing", [True, False])
def test_an_end_beside_a_file_system_that_hangs(
    root: Client, hanging: HangingFileSystem, closing: bool
) -> None:
    """Nobody answers at the path any more, and another server may have it."""
    pids = Halves(root).pids()
    if closing:
        root.unregister("a/1")
    root.shutdown()
    wait_until(lambda: not os.path.exists(root.address), "the path to be free")
    with Manager(root.address) as manager:
        manager.ping()
    hanging.close()
    for pid in pids.values():
        wait_until(lambda pid=pid: ended(pid), f"{pid} ends")


@needs_fuse
def test_an_inspection_that_hangs(folder: Path, small: Callable[..., Client]) -> None:
    """Root's look at a socket of somebody's leads to where nobody answers: through a link."""
    folder.chmod(0o777)
    (folder / "policy").write_text(RULES)
    files = HangingFileSystem(HOSTILE)
    options = ("--policy", str(folder / "policy"), "--mode", "0666")
    root = small(1024, *options, prepare=files.enter)
    root.register("root's", 0)

    def attack(say: Say) -> object:
        files.hang(LOOKUP)
        os.mkdir(folder / "d")
        with socket.socket(socket.AF_UNIX) as sock, Wire(root.address, "hostile") as wire:
            sock.bind(str(folder / "d" / "sock"))
            wire.ask(1, m.Register("a/1", KIND), [sock.fileno()])
            os.rename(folder / "d", folder / "away")
            os.symlink(files.folder, folder / "d")
        say("ready")
        return None

    with AsUser(HOSTILE, attack, file_system=files) as hostile:
        assert hostile.hear() == "ready"
        for _ in range(10):
            described = {info.name: info.descriptors[0] for info in root.infos()}
            assert described["a/1"].health == "its file system does not answer"
            assert described["root's"].type != "unknown"
            assert root.info("root's").descriptors[0].type != "unknown"
        check(root)
    # A file system is ended some time after the process that served it.
    wait_until(lambda: root.info("a/1").descriptors[0].type == "socket", "the look ends")


def test_threads_and_processes_that_cannot_start(folder: Path) -> None:
    """What needs none works as before, and all is well once there is room again."""
    folder.chmod(0o777)

    def serve_alone(say: Say) -> None:
        fd = os.open(os.devnull, os.O_RDONLY)
        with served(folder) as client:
            halves = Halves(client)
            client.register("a", fd)
            former = {pid: limit_processes(pid, 0) for pid in halves.pids().values()}
            for _ in range(20):
                client.register("b", fd)
                client.unregister("b")
            for _ in range(6):
                assert client.info("a").descriptors[0].type == "device"
            with Client(client.address) as other:
                other.fetch_raw("a")[0].close()
            kill(halves.pids()["server"])  # nobody can be made in its place
            for pid, limit in former.items():
                with suppress(ProcessLookupError):
                    limit_processes(pid, limit)
            client.register("c", fd)
            halves.redundant()
            former = {pid: limit_processes(pid, 0) for pid in halves.pids().values()}
            kill(halves.pids()["keeper"])
            client.fetch_raw("a")[0].close()
            for pid, limit in former.items():
                with suppress(ProcessLookupError):
                    limit_processes(pid, limit)
            halves.redundant()
            assert client.names() == ["a", "c"]
            # Both are made anew by now, with nothing that their first parent had open.
            wait_until(lambda: halves.excess("server") == halves.excess("keeper") == -1)
        wait_until(lambda: not (folder / "s").exists(), "its end, which is asked for")
        say("all is well")

    with AsUser(HOSTILE, serve_alone) as alone:
        assert alone.hear(60) == "all is well"


def test_a_server_that_can_start_no_thread(folder: Path) -> None:
    """There is room for one more process, and not for a thread of it. It does what keeps nobody
    waiting, says what it cannot look at, and closes the rest when there is room."""
    folder.chmod(0o777)

    def serve_alone(say: Say) -> None:
        pipe, file = os.pipe()[0], os.open(folder, os.O_TMPFILE | os.O_RDWR)
        with served(folder) as client:
            client.register("pipe", pipe)
            client.register("file", file)
            halves = Halves(client)
            halves.redundant()
            pids, (_, of_keeper) = halves.pids(), Census(client).before
            others = sum(map(tasks, processes_of(os.getuid()) - set(pids.values())))
            limit = limit_processes(pids["keeper"], others + 2)  # its own, and one
            kill(pids["server"])
            server = halves.pids()["server"]
            assert tasks(server) == 1
            for _ in range(20):
                for fd in (pipe, file):
                    client.register("x", fd)
                    client.unregister("x")
            assert client.info("pipe").descriptors[0].type == "pipe"
            (unknown,) = client.info("file").descriptors
            assert unknown.health == "no thread can be started to look at it"
            for pid in halves.pids().values():
                limit_processes(pid, limit)
            client.register("x", pipe)
            client.unregister("x")
            wait_until(lambda: client.info("file").descriptors[0].type == "file")
            halves.redundant()
            # The keeper has what its parent had open, the server was made anew.
            wait_until(lambda: halves.excess("keeper") == of_keeper)
            wait_until(lambda: halves.excess("server") == -1)
        say("all is well")

    with AsUser(ALONE, serve_alone) as alone:
        assert alone.hear(60) == "all is well"


def processes_of(uid: int) -> set[int]:
    found = set()
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            if os.stat(f"/proc/{name}").st_uid == uid:
                found.add(int(name))
    return found


def tasks(pid: int) -> int:
    """How many threads it has, the main one included; 0 if it is gone."""
    try:
        return len(os.listdir(f"/proc/{pid}/task"))
    except OSError:
        return 0


def test_memory_is_free_at_the_end_of_a_connection(folder: Path) -> None:
    """Without a garbage collection: half requests of many connections, again and again."""
    half = header(100_000, 0, 1) + bytes(99_000)
    count, after = 200, []
    with served(folder, collect=False) as client:
        pid = client.stats().server_pid
        for _ in range(6):
            wires = [Wire(client.address, f"{number}") for number in range(count)]
            for wire in wires:
                wire.sock.sendall(half)
            assert client.stats().connections == count + 1  # so it has read them
            for wire in wires:
                wire.close()
            wait_until(lambda: client.stats().connections == 1, "the others to be gone")
            after.append(memory(pid))
    # The allocator may keep, this time or that, what was freed: about as much as there was at once.
    assert after[-1] - after[0] < 2 * count * len(half), after


def memory(pid: int) -> int:
    """Bytes that *pid* has for itself."""
    with open(f"/proc/{pid}/status") as status:
        (line,) = (line for line in status if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024


@contextmanager
def served(folder: Path, *, collect: bool = True) -> Iterator[Client]:
    """A client of a server of this very user, forked: another user can import nothing. *collect*:
    garbage is collected in it."""
    ready, here = os.pipe()
    pid = os.fork()
    if not pid:
        if not collect:
            gc.disable()
        try:
            serve(Settings(path=str(folder / "s"), log_level="CRITICAL"), lambda: os.close(here))
        finally:
            os._exit(0)
    os.close(here)
    os.read(ready, 1)
    os.close(ready)
    with Client(folder / "s") as client:
        try:
            yield client
        finally:
            client.shutdown()
    os.waitpid(pid, 0)


def limit_processes(pid: int, soft: int) -> int:
    """RLIMIT_NPROC of *pid*, threads included; the limit that it had."""
    former, hard = resource.prlimit(pid, resource.RLIMIT_NPROC)
    resource.prlimit(pid, resource.RLIMIT_NPROC, (soft, hard))
    return former
