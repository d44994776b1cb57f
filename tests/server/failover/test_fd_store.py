"""The table in a service manager's store: systemd's part is played by the test."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from commandline import Shell

from fdshare import connect
from fdshare.activation import NotifySocket
from fdshare.kernel.descriptor import Descriptor
from fdshare.protocol.messages import Kind, Registrant
from fdshare.server.core.image import image_of
from fdshare.server.core.records import Drop, Grant, Move, Put, Record
from fdshare.server.core.table import Table
from fdshare.server.failover.fd_store import TABLE, FdStore

Until = Callable[..., Any]

START = """
import json, os, sys
names, numbers = json.loads(sys.argv[1]), json.loads(sys.argv[2])
import fcntl
moved = [fcntl.fcntl(n, fcntl.F_DUPFD, 500) for n in numbers]
for at, number in enumerate(moved):
    os.dup2(number, 3 + at)
    os.close(number)
if names:
    os.environ.update(
        LISTEN_FDS=str(len(names)), LISTEN_FDNAMES=":".join(names), LISTEN_PID=str(os.getpid())
    )
os.execv(sys.executable, [sys.executable, "-m", "fdshare", "serve", *sys.argv[3:]])
"""


class Manager:
    """As PID 1: keeps what a service stores, passes it to the next start."""

    def __init__(self, shell: Shell) -> None:
        self.shell = shell
        self.sock = NotifySocket(str(shell.folder / "notify"))
        self.store: list[tuple[str, Descriptor]] = []
        self.said: list[str] = []
        self.ready = threading.Event()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self, *options: str) -> None:
        """Starts the service with all that is stored, the last first as systemd does."""
        import json

        self.ready.clear()
        with self._lock:
            passed = list(reversed(self.store))
            numbers = [d.fileno() for _, d in passed]
            names = [name for name, _ in passed]
            command = [sys.executable, "-c", START, json.dumps(names), json.dumps(numbers)]
            process = subprocess.Popen(
                [*command, "--fdstore", "--log-level", "warning", *options],
                env={**self.shell.environment, "NOTIFY_SOCKET": self.sock.address},
                pass_fds=numbers,
            )
        self._processes.append(process)
        assert self.ready.wait(30)

    def kill_all(self) -> None:
        """kill -9 of both halves, as nearly at once as can be."""
        stats = self.shell.json("stats")
        pids = [stats["keeper_pid"], stats["server_pid"]]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)  # neither sees the other die
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        for process in self._processes:
            if process.pid in pids:
                process.wait(30)

    def names(self) -> list[str]:
        with self._lock:
            return sorted(name for name, _ in self.store)

    def close(self) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.wait(30)
        self._stop.set()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as waker:
            waker.sendto(b"STOP", self.sock.address)
        self._thread.join()
        self.sock.close()
        for _, descriptor in self.store:
            descriptor.close()

    def _run(self) -> None:
        while not self._stop.is_set():
            said = self.sock.receive()
            assert said is not None
            name = said.value("FDNAME") or "stored"
            self.said += said.lines
            with self._lock:
                if said.says("FDSTORE=1"):
                    self.store += [(name, d) for d in said.descriptors]
                    continue
                if said.says("FDSTOREREMOVE=1"):
                    for kept, descriptor in self.store:
                        if kept == name:
                            descriptor.close()
                    self.store = [(kept, d) for kept, d in self.store if kept != name]
            said.close()
            if said.says("READY=1"):
                self.ready.set()


@pytest.fixture
def manager(folder: Path) -> Iterator[Manager]:
    manager = Manager(Shell(folder))
    yield manager
    manager.close()
    manager.shell.close()


def inode(shell: Shell, name: str) -> int:
    with connect(shell.path) as client:
        (descriptor,) = client.fetch_raw(name)
        with descriptor:
            return os.fstat(descriptor.fileno()).st_ino


def test_the_death_of_both_loses_nothing(manager: Manager) -> None:
    shell = manager.shell
    manager.start()
    shell("register", "web", "--listen", "tcp://127.0.0.1:0")
    shell("register", "config", "--memory", "/proc/version", "--meta", "a=b", "--ttl", "600")
    shell("register", "gone", "--memory", "/dev/null")
    shell("rm", "gone")
    shell("mv", "web", "web2")
    before = {name: inode(shell, name) for name in ("web2", "config")}
    manager.kill_all()
    manager.start()
    assert {name: inode(shell, name) for name in before} == before
    entries = {entry["name"]: entry for entry in shell.json("ls")}
    assert sorted(entries) == ["config", "web2"]
    assert entries["web2"]["generation"] == 4
    assert entries["config"]["metadata"] == {"a": "b"}
    assert entries["config"]["kind"] == "memory"
    assert 500 < entries["config"]["ttl"] <= 600
    # And again, with what was done since.
    shell("register", "more", "--memory", "/dev/null")
    manager.kill_all()
    manager.start()
    assert [entry["name"] for entry in shell.json("ls")] == ["config", "more", "web2"]


def test_the_store_lets_go_of_what_the_server_lets_go(manager: Manager, until: Until) -> None:
    shell = manager.shell
    manager.start()
    assert manager.names() == [TABLE]
    shell("register", "one", "--memory", "/dev/null")
    shell("register", "one", "--memory", "/dev/null", "--replace")
    until(lambda: manager.names() == ["fdshare-2", TABLE], "the first is gone")
    shell("take", "one", "--cat")
    until(lambda: manager.names() == [TABLE], "the second, and its lease")


@pytest.mark.parametrize("half", ["server_pid", "keeper_pid"])
def test_the_death_of_one_half_is_no_matter(manager: Manager, half: str, until: Until) -> None:
    shell = manager.shell
    manager.start()
    shell("register", "one", "--memory", "/dev/null")
    os.kill(shell.json("stats")[half], signal.SIGKILL)
    shell("register", "two", "--memory", "/dev/null")
    shell("rm", "one")
    until(lambda: len(manager.names()) == 2, "one entry, and the table")
    until(lambda: shell.json("stats")["redundant"], "both halves are there again")
    manager.kill_all()
    manager.start()
    assert [entry["name"] for entry in shell.json("ls")] == ["two"]
    shell("stop")


def test_a_new_keeper_is_no_child_of_its_server(manager: Manager, until: Until) -> None:
    shell = manager.shell
    manager.start()
    os.kill(shell.json("stats")["keeper_pid"], signal.SIGKILL)
    until(lambda: shell.json("stats")["redundant"], "another keeper")
    stats = shell.json("stats")
    children = Path(f"/proc/{stats['server_pid']}/task/{stats['server_pid']}/children")
    assert children.read_text() == ""
    until(lambda: f"MAINPID={stats['keeper_pid']}" in manager.said, "it is the main process")


def test_it_survives_an_upgrade(manager: Manager) -> None:
    shell = manager.shell
    manager.start()
    shell("register", "one", "--memory", "/dev/null")
    shell("upgrade")
    shell("register", "two", "--memory", "/dev/null")
    manager.kill_all()
    manager.start()
    assert [entry["name"] for entry in shell.json("ls")] == ["one", "two"]


def test_a_table_is_served_although_the_policy_has_a_fault(
    manager: Manager, folder: Path, until: Until
) -> None:
    shell = manager.shell
    policy = folder / "policy.toml"
    policy.write_text("")
    manager.start("--policy", str(policy))
    shell("register", "one", "--memory", "/dev/null")
    policy.write_text("[[rule]]\n")
    manager.kill_all()
    manager.start("--policy", str(policy))
    assert [entry["name"] for entry in shell.json("ls")] == ["one"]
    assert f"only root and uid {os.geteuid()} are served" in shell.json("stats")["notes"]["policy"]
    assert f"{policy} has a fault" in shell("explain", "list", "--uid", "65534", status=1)
    os.kill(shell.json("stats")["server_pid"], signal.SIGKILL)
    until(lambda: shell.json("stats")["redundant"], "another server")
    assert "policy" in shell.json("stats")["notes"]
    policy.write_text("")
    shell("reload")
    assert "policy" not in shell.json("stats")["notes"]


def test_it_needs_a_service_manager_and_a_keeper(folder: Path) -> None:
    shell = Shell(folder)
    assert "NOTIFY_SOCKET is not set" in shell.fails("serve", "--fdstore", status=2)
    assert not os.path.exists(shell.path)
    assert "--keeper" in shell.fails("serve", "--fdstore", "--no-keeper", status=2)


# The memfd alone, with a service manager that is not there.


@pytest.fixture
def fdstore(monkeypatch: pytest.MonkeyPatch) -> Iterator[FdStore]:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    made = FdStore.new("epoch")
    yield made
    made.memfd.close()


def put(name: str, generation: int, count: int = 1) -> Record:
    change = Put(name, generation, Kind("descriptor", b"\xc0"), count, Registrant(1, 0, 0), 0.0)
    return Record([change], "session", generation, b"answer")


def again(fdstore: FdStore) -> FdStore:
    """Another one, that reads the same memfd."""
    return FdStore(fdstore.memfd)


def state(fdstore: FdStore) -> tuple[object, ...]:
    image, labels = image_of(fdstore.held)
    return msgspec.msgpack.encode(image), labels, fdstore.epoch


def test_what_is_written_is_read(fdstore: FdStore) -> None:
    fdstore.record(put("a", 1, 2), [10, 11])
    fdstore.record(put("b", 2), [12])
    fdstore.record(Record([Move("a", "c", 3)]), [])
    fdstore.record(Record([Grant("c", 7, 1.0)]), [13])
    fdstore.record(Record([Drop("b", 2, "unregistered")]), [])
    assert state(again(fdstore)) == state(fdstore)
    assert list(fdstore.held.handles()) == ["fdshare-1", "fdshare-2", "fdshare-4"]
    assert fdstore.held.answers["session"] == {1: b"answer", 2: b"answer"}


def test_a_record_that_is_not_whole_is_as_if_never_written(fdstore: FdStore) -> None:
    fdstore.record(put("a", 1), [10])
    whole = state(fdstore)
    size = os.fstat(fdstore.memfd.fileno()).st_size
    fdstore.record(put("b", 2), [11])
    end = os.fstat(fdstore.memfd.fileno()).st_size
    for cut in range(size, end - 8):
        os.ftruncate(fdstore.memfd.fileno(), cut)
        assert state(again(fdstore)) == whole
    # The next one takes its place.
    after = again(fdstore)
    after.record(put("c", 2), [12])
    assert sorted(again(fdstore).held.entries) == ["a", "c"]


def test_a_record_that_is_not_as_it_was_written_is_as_if_never_written(fdstore: FdStore) -> None:
    fdstore.record(put("a", 1), [10])
    whole = state(fdstore)
    fdstore.record(put("tail", 2), [11])
    fd = fdstore.memfd.fileno()
    data = os.pread(fd, os.fstat(fd).st_size, 0)
    os.pwrite(fd, b"tale", data.index(b"tail"))  # a good name, too
    assert state(again(fdstore)) == whole


def test_the_memfd_does_not_grow_for_ever(fdstore: FdStore) -> None:
    for generation in range(1, 3000):
        fdstore.record(put("name", generation), [10])
    assert os.fstat(fdstore.memfd.fileno()).st_size < 1 << 18
    assert state(again(fdstore)) == state(fdstore)


def test_reconciling_keeps_the_labels_of_what_is_known(fdstore: FdStore) -> None:
    class FakeHandle:
        fd = 0

    table = Table()
    for record in (put("a", 1), put("b", 2, 2)):
        table.apply(record, [FakeHandle(), FakeHandle()])
        fdstore.record(record, [0] * record.changes[0].count)  # type: ignore[union-attr]
    # What the predecessor did and did not come to write:
    table.apply(Record([Drop("a", 1, "unregistered")]), [])
    table.apply(put("c", 3), [FakeHandle()])
    fdstore.reconcile(table)
    assert list(fdstore.held.handles()) == ["fdshare-2", "fdshare-3", "fdshare-4"]
    assert state(again(fdstore)) == state(fdstore)


def test_what_was_not_kept_is_lost_alone(
    fdstore: FdStore, caplog: pytest.LogCaptureFixture
) -> None:
    fdstore.record(put("a", 1), [10])
    fdstore.record(put("b", 2), [11])
    passed = {
        label: Descriptor(os.open(os.devnull, os.O_RDONLY)) for label in ("fdshare-2", "fdshare-9")
    }
    table = fdstore.restore(passed)
    assert list(table.entries) == ["b"]
    assert table.generation == 2
    (handle,) = table.handles()
    os.close(handle.fd)
    assert "'a' is lost" in caplog.text
    assert passed["fdshare-9"].closed
