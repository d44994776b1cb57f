"""keeper: either half is killed, and nothing that was acknowledged is lost."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from breaking import (
    FIXED,
    Half,
    Halves,
    Wire,
    cpu_seconds,
    ended,
    identities,
    identity,
    kill,
    resident,
)
from conftest import census, wait_until
from ending import let_end
from nursery import Manager, Process

from fdshare.activation import NotifySocket
from fdshare.client.blocking.client import Client
from fdshare.client.watch_state import Snapshot
from fdshare.errors import (
    InvalidArgument,
    KeeperUnavailable,
    NameNotFound,
    NameTaken,
    NoServer,
    ServerGone,
)
from fdshare.kernel.ancillary import send_message
from fdshare.kernel.credentials import peer_credentials
from fdshare.kernel.descriptor import Descriptor
from fdshare.kernel.endpoint import connect, listen
from fdshare.protocol import messages as m
from fdshare.server.core.records import Move, Put, Record
from fdshare.server.core.table import Table
from fdshare.server.failover.holdings import Holdings
from fdshare.server.failover.journal import encode_letter
from fdshare.server.failover.keeper import Keeper
from fdshare.server.loop.poller import READ
from fdshare.server.settings import Settings

# Which half dies, in this order.
ALL: list[list[Half]] = [
    ["server"],
    ["keeper"],
    ["server", "keeper"],
    ["keeper", "server"],
    ["server", "server"],
    ["keeper", "keeper"],
    ["keeper", "server", "keeper", "server"],
]
SOME: list[list[Half]] = [["server"], ["keeper"], ["keeper", "server", "keeper"]]
KIND = m.Kind("fd", m.encode({}))


@pytest.fixture
def manager() -> Iterator[Manager]:
    with Manager(limits={"journal_timeout": 0.3}) as manager:
        yield manager


@pytest.fixture
def halves(manager: Manager) -> Iterator[Halves]:
    """Both are accounted for at the end of the test."""
    halves = Halves(manager)
    halves.check_census()
    yield halves
    halves.redundant()
    halves.check_census()


def deaths(orders: list[list[Half]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("order", orders, ids="-".join)


def table(client: Client) -> list[tuple[Any, ...]]:
    """All that must survive of each entry."""
    return [
        (e.name, e.generation, e.kind, e.registrant, e.count, e.lifetime, e.grace, e.metadata)
        for e in client.infos()
    ]


# The table.


@deaths(ALL)
def test_the_table_survives(
    manager: Manager, halves: Halves, folder: Path, order: list[Half]
) -> None:
    files = {}
    for index in range(20):
        path = folder / f"{index}"
        path.write_text(f"this is {index}")
        files[f"file/{index}"] = open(path)
    for name, file in files.items():
        manager.register(name, file, metadata={"is": name}, grace=1.5)
    manager.register("file/3", files["file/4"], replace=True)
    manager.unregister("file/7")
    manager.rename("file/8", "moved/8")
    before, generation = table(manager), manager.stats().generation
    serial = manager.stats().serial
    for half in order:
        halves.kill(half)
    assert table(manager) == before
    assert (manager.stats().generation, manager.stats().serial) == (generation, serial)
    expected = {**files, "file/3": files["file/4"], "moved/8": files["file/8"]}
    del expected["file/7"], expected["file/8"]
    for name, file in manager.fetch_many(manager.names()).items():
        assert identity(file) == identity(expected[name])
        assert file.read() == f"this is {os.path.basename(expected[name].name)}"
        file.seek(0)
        file.close()
    for half in ("server", "keeper"):
        held = identities(halves.pids()[half])
        for file in files.values():
            here = [f for f in expected.values() if f is file]
            assert held.count(identity(file)) == len(here)
    for file in files.values():
        file.close()


@deaths(SOME)
def test_generations_go_on(manager: Manager, halves: Halves, order: list[Half]) -> None:
    read, write = os.pipe()
    last = manager.register("a", read).generation
    for half in order:
        halves.kill(half)
        entry = manager.register("a", read, if_generation=last)
        assert entry.generation == last + 1
        last = entry.generation
    os.close(read)
    os.close(write)


@deaths(SOME)
def test_the_listening_socket_survives(manager: Manager, halves: Halves, order: list[Half]) -> None:
    inode = os.stat(manager.address).st_ino
    for half in order:
        halves.kill(half)
    assert os.stat(manager.address).st_ino == inode
    assert os.stat(manager.address).st_mode & 0o777 == 0o600
    with connect(manager.address) as sock:
        # The client checks who listens: a process that lives.
        assert peer_credentials(sock).pid == halves.pids()["keeper"]


def test_connects_never_fail_meanwhile(manager: Manager, halves: Halves) -> None:
    done = threading.Event()
    failures: list[Exception] = []
    served = 0

    def knock() -> None:
        nonlocal served
        while not done.is_set():
            try:
                with connect(manager.address):
                    served += 1
            except Exception as error:
                failures.append(error)

    thread = threading.Thread(target=knock)
    thread.start()
    try:
        for half in ("server", "keeper") * 4:
            halves.kill(half)
    finally:
        done.set()
        thread.join()
    assert not failures
    assert served


def test_a_table_of_every_kind_survives(manager: Manager, halves: Halves, folder: Path) -> None:
    path = folder / "u"
    with socket.socket(socket.AF_UNIX) as unix, socket.create_server(("127.0.0.1", 0)) as tcp:
        unix.bind(str(path))
        things = {
            "tcp": tcp,
            "unix": unix,
            "memfd": os.memfd_create("x"),
            "pidfd": os.pidfd_open(os.getpid()),
            "eventfd": os.eventfd(3),
            "epoll": select.epoll(),
            "o_path": os.open(folder, os.O_PATH),
            "folder": os.open(folder, os.O_RDONLY),
            "null": os.open("/dev/null", os.O_RDWR),
        }
        for name, thing in things.items():
            manager.register(name, thing)
        halves.kill("server")
        halves.kill("keeper")
        halves.kill("server")
        for name, thing in things.items():
            for descriptor in manager.fetch_raw(name):
                with descriptor:
                    assert identity(descriptor) == identity(thing)
        for thing in things.values():
            if isinstance(thing, int):
                os.close(thing)
        things["epoll"].close()  # type: ignore[union-attr]


def test_an_entry_in_itself_survives(manager: Manager, halves: Halves) -> None:
    """The server's own listener, and a connection to it, can be held by it."""
    with connect(manager.address) as mine:
        manager.register("mine", mine)
    halves.kill("server")
    assert manager.names() == ["mine"]
    manager.unregister("mine")


@deaths(SOME)
def test_an_authkey_survives(order: list[Half]) -> None:
    with Manager(authkey=b"secret") as manager:
        for half in order:
            Halves(manager).kill(half)
        with Client(manager.address, authkey=b"secret") as client:
            client.ping()


# Watchers.


@deaths(SOME)
def test_a_watch_converges(manager: Manager, halves: Halves, order: list[Half]) -> None:
    read, write = os.pipe()
    with Client(manager.address) as client, client.watch(timeout=20) as watch:
        assert isinstance(next(watch), Snapshot)
        manager.register("before", read)
        while watch.held != {"before": 1}:
            next(watch)
        for half in order:
            halves.kill(half)
        entry = manager.register("after", read)
        manager.unregister("before")
        while watch.held != {"after": entry.generation}:
            next(watch)
    os.close(read)
    os.close(write)


def test_a_watch_tells_that_the_server_was_lost(manager: Manager, halves: Halves) -> None:
    with Client(manager.address) as client, client.watch(timeout=20) as watch:
        assert next(watch).reason == "start"  # type: ignore[union-attr]
        halves.kill("server")
        assert next(watch).reason == "reconnect"  # type: ignore[union-attr]


def test_a_waiting_fetch_goes_on(manager: Manager, halves: Halves) -> None:
    found: list[Any] = []

    def wait() -> None:
        with Client(manager.address) as client:
            found.append(client.fetch("late", timeout=20))

    thread = threading.Thread(target=wait)
    thread.start()
    wait_until(lambda: manager.stats().connections >= 2, "the client waits")
    for half in ("server", "keeper", "server"):
        halves.kill(half)
    with socket.socket() as sock:
        manager.register("late", sock)
        thread.join()
        assert identity(found[0]) == identity(sock)
        found[0].close()


# Repeats.


def repeat(manager: Manager, halves: Halves, death: Half | None, ask: Callable[[Wire], Any]) -> Any:
    """The answers to two requests that are the same, with a death between them."""
    with Wire(manager.address, "the same session") as wire:
        first = ask(wire)
        if death is None:
            return first, ask(wire)
        halves.kill(death)
        if death == "keeper":
            return first, ask(wire)
    with Wire(manager.address, "the same session") as wire:
        return first, ask(wire)


both = pytest.mark.parametrize("death", [None, "server", "keeper"])


@both
def test_a_repeated_register_is_recognised(
    manager: Manager, halves: Halves, death: Half | None
) -> None:
    read, write = os.pipe()
    request = m.Register("a", KIND)
    first, second = repeat(manager, halves, death, lambda wire: wire.ask(7, request, [read]).reply)
    assert first == second == m.Registered("a", 1)
    assert manager.stats().generation == 1
    with Wire(manager.address, "another session") as wire:
        assert isinstance(wire.refused(7, request, [read]), NameTaken)
    os.close(read)
    os.close(write)


@both
@pytest.mark.parametrize("condition", [{"replace": True}, {"if_generation": 1}])
def test_a_repeated_replace_is_recognised(
    manager: Manager, halves: Halves, death: Half | None, condition: dict[str, Any]
) -> None:
    read, write = os.pipe()
    manager.register("a", read)
    request = m.Register("a", KIND, **condition)
    first, second = repeat(manager, halves, death, lambda wire: wire.ask(7, request, [write]).reply)
    assert first == second == m.Registered("a", 2)
    assert manager.stats().generation == 2
    os.close(read)
    os.close(write)


@both
def test_a_repeated_unregister_is_recognised(
    manager: Manager, halves: Halves, death: Half | None
) -> None:
    read, write = os.pipe()
    manager.register("a", read)

    def ask(wire: Wire) -> Any:
        reply = wire.ask(7, m.Unregister("a")).reply
        # Somebody else's of the same name must not go with the repeat.
        if "a" not in manager:
            manager.register("a", write)
        return reply

    assert repeat(manager, halves, death, ask) == (m.Done(), m.Done())
    assert manager.info("a").generation == 2
    os.close(read)
    os.close(write)


@both
def test_a_repeated_rename_is_recognised(
    manager: Manager, halves: Halves, death: Half | None
) -> None:
    read, write = os.pipe()
    manager.register("a", read)
    first, second = repeat(
        manager, halves, death, lambda wire: wire.ask(7, m.Rename("a", "b")).reply
    )
    assert first == second == m.Registered("b", 2)
    assert manager.names() == ["b"]
    os.close(read)
    os.close(write)


@both
def test_a_repeated_take_is_leased_again(
    manager: Manager, halves: Halves, death: Half | None
) -> None:
    """The lease of an answer that nobody got has ended: the repeat gets the entry."""
    read, write = os.pipe()
    manager.register("a", read)

    def ask(wire: Wire) -> Any:
        said = wire.ask(7, m.Take("a", 5.0))
        for descriptor in said.descriptors:
            descriptor.close()
        return said.reply

    first, second = repeat(manager, halves, death, ask)
    assert first == second
    wait_until(lambda: manager.names() == ["a"])
    os.close(read)
    os.close(write)


@both
def test_a_repeated_bind_finds_the_first(
    manager: Manager, halves: Halves, death: Half | None
) -> None:
    def ask(wire: Wire) -> Any:
        said = wire.ask(7, m.Bind("web", "tcp://127.0.0.1:0"))
        with said.descriptors[0] as descriptor:
            return said.reply, identity(descriptor)

    first, second = repeat(manager, halves, death, ask)
    assert first == second


@both
def test_a_repeated_reload_is_harmless(
    manager: Manager, halves: Halves, death: Half | None
) -> None:
    answers = repeat(manager, halves, death, lambda wire: wire.ask(7, m.Reload()).reply)
    assert answers == (m.Done(), m.Done())


def test_answers_of_those_who_leave_are_forgotten(manager: Manager, halves: Halves) -> None:
    read, write = os.pipe()
    with Wire(manager.address, "short") as wire:
        wire.ask(7, m.Register("a", KIND), [read])
    wait_until(lambda: manager.stats().connections == 1)
    with Wire(manager.address, "short") as wire:
        assert isinstance(wire.refused(7, m.Register("a", KIND), [read]), NameTaken)
    os.close(read)
    os.close(write)


def test_a_session_that_came_back_early_keeps_its_answers(manager: Manager, halves: Halves) -> None:
    """The end of the old connection may be seen after the Hello of the new one."""
    read, write = os.pipe()
    old = Wire(manager.address, "same")
    with Wire(manager.address, "same") as wire:
        wire.ask(8, m.Register("a", KIND), [read])
        old.close()
        wait_until(lambda: manager.stats().connections == 2)
        assert wire.ask(8, m.Register("a", KIND), [read]).reply == m.Registered("a", 1)
    os.close(read)
    os.close(write)


def test_without_a_session_nothing_is_repeated(manager: Manager, halves: Halves) -> None:
    read, write = os.pipe()
    with Wire(manager.address) as wire:
        wire.ask(7, m.Register("a", KIND), [read])
        assert isinstance(wire.refused(7, m.Register("a", KIND), [read]), NameTaken)
    os.close(read)
    os.close(write)


# What does not fit into the journal.


def test_a_record_that_does_not_fit_is_refused(manager: Manager, halves: Halves) -> None:
    """One that the journal would cut, and one that the socket would not take at all."""
    read, write = os.pipe()
    pids = halves.pids()
    for size in (1 << 17, 1 << 18, (1 << 20) - 200):
        kind = m.Kind("fd", m.encode(b"x" * size))
        with Wire(manager.address, "big") as wire:
            assert isinstance(wire.refused(1, m.Register("a", kind), [read]), InvalidArgument)
    assert halves.pids() == pids
    assert manager.names() == []
    os.close(read)
    os.close(write)


def test_a_session_has_a_short_name(manager: Manager, halves: Halves) -> None:
    with Wire(manager.address, greet=False) as wire:
        wire.send(0, m.Hello(m.MAGIC, m.VERSION, "x" * 65))
        assert isinstance(wire.receive().reply, m.Refused)
        with pytest.raises((EOFError, ConnectionResetError)):
            wire.receive()


def test_the_largest_entry_fits(manager: Manager, halves: Halves) -> None:
    """250 descriptors, a lifeline, all of the metadata, a long name."""
    fds = [os.eventfd(0) for _ in range(250)]
    near, far = socket.socketpair()
    name = "n" * 255
    request = m.Register(name, KIND, lifetime="connection", metadata={"k": "v" * 4095})
    with Wire(manager.address, "large") as wire:
        wire.ask(1, request, [*fds, far.fileno()])
    far.close()
    halves.kill("server")
    halves.kill("keeper")
    assert manager.info(name).count == 250
    near.close()
    wait_until(lambda: not manager.names())
    for fd in fds:
        os.close(fd)


def test_a_lifeline_that_is_none_is_refused(manager: Manager, halves: Halves, folder: Path) -> None:
    """A file cannot be watched: no server could start with it in the table."""
    (folder / "f").touch()
    pids = halves.pids()
    with open(folder / "f") as file, Wire(manager.address, "bad") as wire:
        fds = [file.fileno(), file.fileno()]
        error = wire.refused(1, m.Register("a", KIND, lifetime="connection"), fds)
        assert isinstance(error, InvalidArgument)
    assert halves.pids() == pids
    assert manager.names() == []


# A keeper that does not read.


@pytest.fixture
def stopped(manager: Manager, halves: Halves) -> Iterator[int]:
    """The pid of a keeper that was stopped; it goes on at the end of the test."""
    pid = halves.pids()["keeper"]
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: state_of(pid) == "T")
    yield pid
    os.kill(pid, signal.SIGCONT)


def state_of(pid: int) -> str:
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]


def fill(manager: Manager, fd: int) -> int:
    """Registers until the journal is full. How many it took."""
    count = 0
    with pytest.raises(KeeperUnavailable, match="keeper"):
        while True:
            manager.register(f"filler/{count}", fd, metadata={"x": "y" * 4000})
            count += 1
            assert count < 10_000
    return count


def test_a_stopped_keeper_bounds_changes_and_lets_fetches_through(
    manager: Manager, halves: Halves, stopped: int
) -> None:
    read, write = os.pipe()
    count = fill(manager, read)
    assert count > 0
    # What was refused did not happen, what was acknowledged did, and reading goes on.
    assert manager.stats().names == count
    for _ in range(100):
        with manager.fetch_raw("filler/0")[0] as descriptor:
            assert identity(descriptor) == identity(read)
    with pytest.raises(KeeperUnavailable):
        manager.unregister("filler/0")
    with pytest.raises(KeeperUnavailable):
        manager.rename("filler/0", "b")
    with pytest.raises(KeeperUnavailable):
        manager.take_raw("filler/0")
    os.kill(stopped, signal.SIGCONT)
    manager.register("after", read)
    assert halves.pids()["keeper"] == stopped
    halves.kill("server")
    assert len(manager.names()) == count + 1
    os.close(read)
    os.close(write)


def test_a_stopped_keeper_holds_up_nobody_who_reads(
    manager: Manager, halves: Halves, stopped: int
) -> None:
    """One client's change waits; another's fetches do not."""
    read, write = os.pipe()
    fill(manager, read)
    with Wire(manager.address, "waits") as wire, Client(manager.address) as reader:
        wire.send(1, m.Unregister("filler/0"))
        fetches = 0

        def refused() -> bool:
            nonlocal fetches
            for _ in range(50):  # busy as it is kept, the server finds the time to refuse
                reader.fetch_raw("filler/0")[0].close()
                fetches += 1
            return bool(select.select([wire.sock], [], [], 0)[0])

        wait_until(refused)
        assert isinstance(wire.receive().reply, m.Refused)
        assert fetches > 50
    os.close(read)
    os.close(write)


def test_what_is_due_does_not_spin_on_a_stopped_keeper(
    manager: Manager, halves: Halves, stopped: int
) -> None:
    read, write = os.pipe()
    manager.register("brief", read, ttl=0.5)
    fill(manager, read)
    wait_until(lambda: manager.info("brief").ttl < 0, "the entry is due")  # type: ignore[operator]
    server = halves.pids()["server"]
    used, since = cpu_seconds(server), time.monotonic()
    wait_until(lambda: time.monotonic() > since + 0.5)
    assert cpu_seconds(server) - used < 0.25
    os.kill(stopped, signal.SIGCONT)
    wait_until(lambda: "brief" not in manager)
    os.close(read)
    os.close(write)


def test_a_stopped_keeper_can_be_killed(manager: Manager, halves: Halves) -> None:
    read, write = os.pipe()
    pid = halves.pids()["keeper"]
    os.kill(pid, signal.SIGSTOP)
    count = fill(manager, read)
    halves.kill("keeper")
    manager.register("after", read)
    halves.kill("server")
    assert len(manager.names()) == count + 1
    os.close(read)
    os.close(write)


def test_a_server_killed_while_the_keeper_was_stopped(manager: Manager, halves: Halves) -> None:
    """What waits in the journal is read before there is a successor."""
    read, write = os.pipe()
    pids = halves.pids()
    os.kill(pids["keeper"], signal.SIGSTOP)
    count = fill(manager, read)
    kill(pids["server"])
    os.kill(pids["keeper"], signal.SIGCONT)
    assert len(manager.names()) == count
    halves.redundant()
    os.close(read)
    os.close(write)


@pytest.mark.parametrize("half", ["server", "keeper"])
def test_it_ends_although_a_half_is_stopped(half: Half) -> None:
    with Manager() as manager:
        pids = Halves(manager).pids()
        os.kill(pids[half], signal.SIGSTOP)
        manager.shutdown()
    for pid in pids.values():
        wait_until(lambda pid=pid: ended(pid), f"{pid} ends")
    assert not os.path.exists(manager.address)


def test_a_shutdown_outlives_a_keeper_that_did_not_hear_of_it() -> None:
    with Manager() as manager:
        pids = Halves(manager).pids()
        os.kill(pids["keeper"], signal.SIGSTOP)
        with Client(manager.address) as client:
            client.shutdown()
        kill(pids["keeper"])
        wait_until(lambda: ended(pids["server"]), "the server ends")
        wait_until(lambda: not os.path.exists(manager.address), "so does the new keeper")


# The owner.

OWNER = """
import os, sys
from fdshare.manager import Manager

manager = Manager(sys.argv[1]).start()
if "fork" in sys.argv and not os.fork():
    os.read(0, 1)
    os._exit(0)
print("ready", flush=True)
os.read(0, 1)
if "fork" not in sys.argv:
    manager.shutdown()
"""


@pytest.fixture
def owner(folder: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts a process that owns a Manager at `folder`/s."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*arguments: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-c", OWNER, str(folder / "s"), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@deaths(SOME)
@pytest.mark.parametrize("how", ["kill", "end", "fork"])
def test_all_ends_with_the_owner(
    owner: Callable[..., subprocess.Popen[bytes]], folder: Path, order: list[Half], how: str
) -> None:
    process = owner(how)
    with Client(folder / "s") as client:
        for half in order:
            Halves(client).kill(half)
        pids = Halves(client).pids()
    if how == "end":
        process.communicate(b"x")
        assert process.returncode == 0
    else:
        process.kill()
    for pid in pids.values():
        wait_until(lambda pid=pid: ended(pid), f"{pid} ends")
    assert not (folder / "s").exists()


def test_the_owner_dies_while_a_half_is_replaced(
    owner: Callable[..., subprocess.Popen[bytes]], folder: Path
) -> None:
    for half in ("server", "keeper"):
        process = owner()
        with Client(folder / "s") as client:
            Halves(client).redundant()
            pids = Halves(client).pids()
        kill(pids[half])
        process.kill()
        process.wait()
        wait_until(lambda: not (folder / "s").exists(), "the socket is removed")


def test_a_terminals_signals_are_the_owners(manager: Manager, halves: Halves) -> None:
    """Ctrl-C goes to all processes of the foreground; the owner decides, however often a half was
    replaced."""
    for half in ("server", "keeper"):
        pids = halves.pids()
        for pid in pids.values():
            os.kill(pid, signal.SIGINT)
        manager.ping()
        assert halves.pids() == pids
        halves.kill(half)


# The service manager.


@pytest.fixture
def served(folder: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts `fdshare serve` at `folder`/s; nothing of it is left after the test."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*options: str, **environment: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "fdshare", "serve", str(folder / "s"), *options]
        env = {**os.environ, **environment}
        with open(folder / "log", "ab") as log:
            process = Process(command, env=env, stdin=subprocess.DEVNULL, stderr=log)
        started.append(process)
        wait_until(lambda: answers(folder / "s"), "the server answers")
        return process

    yield start
    if (folder / "s").exists():
        # A test that ended it may be faster than its end.
        with Client(folder / "s") as client, suppress(NoServer, ServerGone):
            client.shutdown()
    for process in started:
        let_end(process)


def answers(path: Path) -> bool:
    try:
        connect(path).close()
    except NoServer:
        return False
    return True


def expect(socket_: NotifySocket, key: str) -> str:
    """The value of the next notification that has *key*."""
    while True:
        ready, _, _ = select.select([socket_], [], [], 20)
        assert ready, f"no {key}="
        said = socket_.receive()
        assert said is not None
        said.close()
        if (value := said.value(key)) is not None:
            return value


def test_the_service_manager_is_told(
    served: Callable[..., subprocess.Popen[bytes]], folder: Path
) -> None:
    with NotifySocket(str(folder / "notify")) as told:
        process = served(NOTIFY_SOCKET=told.address, WATCHDOG_USEC="200000")
        assert expect(told, "READY") == "1"
        with Client(folder / "s") as client:
            halves = Halves(client)
            pids = halves.pids()
            assert pids["keeper"] == process.pid
            assert expect(told, "WATCHDOG") == "1"
            halves.kill("server")
            assert expect(told, "WATCHDOG") == "1"
            halves.kill("keeper")
            keeper = halves.pids()["keeper"]
        assert expect(told, "MAINPID") == str(keeper)
        assert expect(told, "WATCHDOG") == "1"
        os.kill(keeper, signal.SIGTERM)
        assert expect(told, "STOPPING") == "1"
        wait_until(lambda: ended(keeper))
        process.wait()
    assert not (folder / "s").exists()


def test_the_service_manager_is_told_without_a_keeper(
    served: Callable[..., subprocess.Popen[bytes]], folder: Path
) -> None:
    with NotifySocket(str(folder / "notify")) as told:
        process = served("--no-keeper", NOTIFY_SOCKET=told.address, WATCHDOG_USEC="200000")
        assert expect(told, "READY") == "1"
        for _ in range(3):
            assert expect(told, "WATCHDOG") == "1"
        process.terminate()
        assert expect(told, "STOPPING") == "1"
        process.wait()
    assert not (folder / "s").exists()


def test_a_service_manager_that_is_gone_harms_nobody(
    served: Callable[..., subprocess.Popen[bytes]], folder: Path
) -> None:
    with NotifySocket(str(folder / "notify")) as told:
        process = served(NOTIFY_SOCKET=told.address, WATCHDOG_USEC="200000")
        expect(told, "READY")
    with Client(folder / "s") as client:
        halves = Halves(client)
        for half in ("keeper", "server", "keeper"):
            halves.kill(half)
        client.shutdown()
    process.wait()


@pytest.mark.parametrize("half", ["server", "keeper"])
def test_a_crash_loop_backs_off_and_keeps_the_table(
    served: Callable[..., subprocess.Popen[bytes]], folder: Path, half: Half
) -> None:
    served("--limit", "journal_timeout=0.3")
    read, write = os.pipe()
    with Client(folder / "s") as client:
        halves = Halves(client)
        client.register("a", read)
        last = halves.pids()[half]
        for _ in range(4):
            kill(last)
            last = wait_until(lambda last=last: (p := halves.pids()[half]) != last and p)
        kill(last)
        if half == "keeper":
            # Nobody records a change; reading goes on.
            assert not client.stats().redundant
            with pytest.raises(KeeperUnavailable, match="there is no other yet"):
                client.shutdown()
        client.fetch_raw("a")[0].close()
        client.register("b", read)  # within the timeout
        wait_until(lambda: client.stats().redundant)
        assert client.names() == ["a", "b"]
    said = (folder / "log").read_text()
    assert f"the {half} died 5 times in 10 s" in said
    assert "it was killed by signal 9" in said
    os.close(read)
    os.close(write)


@deaths(SOME)
def test_signals_end_it(
    served: Callable[..., subprocess.Popen[bytes]], folder: Path, order: list[Half]
) -> None:
    process = served("--log-level", "warning")
    with Client(folder / "s") as client:
        for half in order:
            Halves(client).kill(half)
        pids = Halves(client).pids()
        # The terminal sends it to both; the keeper commands.
        for pid in pids.values():
            os.kill(pid, signal.SIGTERM)
    for pid in pids.values():
        wait_until(lambda pid=pid: ended(pid))
    process.wait()
    assert not (folder / "s").exists()


def test_halves_do_not_stand_on_each_other(manager: Manager, halves: Halves) -> None:
    """Each half is forked by the other; what two hundred generations had begun would fill the
    stack of the next."""
    read, write = os.pipe()
    manager.register("a", read)
    sizes = []
    for _ in range(110):
        halves.kill("keeper")
        halves.kill("server")
        sizes.append(resident(halves.pids()["server"]))
    assert manager.names() == ["a"]
    assert sizes[-1] < sizes[10] + (4 << 20)
    os.close(read)
    os.close(write)


def test_the_fixed_descriptors_are_these(manager: Manager, halves: Halves) -> None:
    """Counted by what they are, so that the census of the others means something."""
    for half in ("server", "keeper"):
        halves.kill(half)
    keeper = census(halves.pids()["keeper"])
    assert len(keeper) == FIXED
    kinds = [target.partition(":")[0] for fd, target in keeper.items() if fd > 2]
    assert kinds.count("socket") == 5
    assert kinds.count("anon_inode") == 2  # the epoll and the pidfd
    assert manager.address + ".lock" in keeper.values()


def test_what_is_not_there_is_still_not_there(manager: Manager, halves: Halves) -> None:
    read, write = os.pipe()
    for half in ("server", "keeper", "server"):
        with manager.take_raw(manager.register("a", read).name)[0]:
            pass
        wait_until(lambda: manager.stats().leases == 0)
        halves.kill(half)
        with pytest.raises(NameNotFound):
            manager.fetch("a")
    os.close(read)
    os.close(write)


# One keeper alone: the test is its server.


@pytest.fixture
def lone(folder: Path) -> Iterator[tuple[Keeper, socket.socket]]:
    """A keeper in this process that follows the journal whose other end the test has, and a server
    that is a mere process."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    server = Descriptor(os.pidfd_open(process.pid))
    settings = Settings(path=str(folder / "s"))
    holdings = Holdings(settings, listen(folder / "s"), Table(), "epoch")
    keeper = Keeper(holdings, lambda holdings, half: None, journal=ours, server=server)
    keeper._follow()
    yield keeper, theirs
    theirs.close()
    keeper._let_go()
    ours.close()
    server.close()
    process.kill()
    process.communicate()


def put(generation: int) -> Record:
    change = Put(f"n{generation}", generation, KIND, 1, m.Registrant(1, 0, 0), 0.0)
    return Record([change])


IMPOSSIBLE = Record([Move("nobody has this name", "b", 1)])


def test_the_journal_of_the_dead_is_read_to_its_end(
    lone: tuple[Keeper, socket.socket], null: int
) -> None:
    """Also past the ECONNRESET of what the server had not read: the keeper's hello."""
    keeper, journal = lone
    for generation in range(1, 101):
        send_message(journal, (encode_letter(put(generation)),), [null])
    journal.close()
    keeper._on_death(READ)
    assert list(keeper._holdings.table.entries) == [f"n{n}" for n in range(1, 101)]


def test_a_record_that_cannot_be_applied_ends_the_keeper(
    lone: tuple[Keeper, socket.socket],
) -> None:
    """The server has the table, and makes another keeper of that."""
    keeper, journal = lone
    journal.send(encode_letter(IMPOSSIBLE))
    with pytest.raises(KeyError):
        keeper._on_journal(READ)


def test_the_dead_servers_other_records_are_applied(
    lone: tuple[Keeper, socket.socket], null: int, caplog: pytest.LogCaptureFixture
) -> None:
    """There is nobody any more who has the table."""
    keeper, journal = lone
    send_message(journal, (encode_letter(put(1)),), [null])
    journal.send(encode_letter(IMPOSSIBLE))
    send_message(journal, (encode_letter(put(2)),), [null])
    keeper._on_death(READ)
    assert list(keeper._holdings.table.entries) == ["n1", "n2"]
    assert "cannot be applied" in caplog.text
