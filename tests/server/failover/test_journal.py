"""journal: records that do not fit into it, and a keeper that does not read it."""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from breaking import (
    Halves,
    Wire,
    cpu_seconds,
    identity,
    kill,
)
from conftest import wait_until
from nursery import Manager

from fdshare.client.blocking.client import Client
from fdshare.errors import (
    InvalidArgument,
    KeeperUnavailable,
)
from fdshare.kernel.descriptor import Descriptor
from fdshare.kernel.endpoint import listen
from fdshare.protocol import messages as m
from fdshare.server.core.records import Put, Record
from fdshare.server.failover.fd_store import FdStore
from fdshare.server.failover.journal import Journal, Note, encode_letter
from fdshare.server.loop.closing import Handle
from fdshare.server.loop.server import Server
from fdshare.server.settings import Settings
from server.orders import KIND


def test_a_record_that_does_not_fit_is_refused(manager: Manager, halves: Halves) -> None:
    """A kind of more bytes than an entry may have, however many the message may."""
    read, write = os.pipe()
    pids = halves.pids()
    for size in (1 << 14, 1 << 16, (1 << 17) - 200):
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


@contextmanager
def alone(folder: Path, pid: int | None = None) -> Iterator[tuple[Server, Journal, socket.socket]]:
    """A server that does not run, its journal, and the keeper's end of that; *pid* is the keeper,
    or this process."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with listen(folder / "s") as listener, theirs:
        store = FdStore(Descriptor(os.memfd_create("table")), 10)
        pid = pid or os.getpid()
        keeper = Descriptor(os.pidfd_open(pid))
        journal = Journal(ours, keeper, pid, store)
        settings = Settings(path=str(folder / "s"))
        server = Server(listener.socket, settings, journal=journal)
        journal.attach(server)
        yield server, journal, theirs
        server.shut_down()
        journal.close()
        journal._keeper.close()
        store.memfd.close()


def test_the_store_is_asked_later_where_no_thread_can_start(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")  # EAGAIN of clone(2)

    with alone(folder) as (server, journal, _), monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", full)
        before = len(server.loop._timers)
        journal.refill_store()
        assert len(server.loop._timers) == before + 1


def test_a_store_that_could_not_be_written_is_mended(
    folder: Path, null: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, data: bytes, at: int) -> int:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr("fdshare.server.failover.journal._AGAIN", 0.0)
    record = Record([Put("a", 1, KIND, 1, m.Registrant(1, 0, 0), 0.0)])
    with alone(folder) as (server, journal, _):
        store = journal._fdstore
        assert store is not None
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", full)
            journal.write(record, [null])
            server.table.apply(record, [Handle(os.dup(null))])
            assert journal.stored("a") is False
            server.loop.turn()
            assert store.stale
        server.loop.turn()
        assert not store.stale
        assert list(store.held.entries) == ["a"]


@pytest.fixture
def mortal() -> Iterator[int]:
    """The pid of a process that stands for a keeper, and may be killed."""
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process.pid
        process.kill()


def test_what_the_dead_keeper_has_told_is_done(folder: Path, mortal: int) -> None:
    with alone(folder, mortal) as (server, journal, keeper):
        keeper.send(encode_letter(Note("end")))
        keeper.close()
        assert journal.replace_keeper() is None
        assert not server.run()
        assert journal.stand_by() is None
        assert journal.is_alone()


def test_a_signal_for_both_ends_the_server_of_a_dead_keeper(folder: Path, mortal: int) -> None:
    with alone(folder, mortal) as (server, journal, keeper):
        keeper.close()
        journal.note_signal(signal.SIGTERM, None)
        assert journal.replace_keeper() is None
        assert not server.run()


def test_a_signal_for_the_server_alone_is_forgotten(
    folder: Path, mortal: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fdshare.server.failover.journal._TOGETHER", 0.0)  # it was long ago
    with alone(folder, mortal) as (_, journal, keeper):
        keeper.close()
        journal.note_signal(signal.SIGTERM, None)
        if (half := journal.replace_keeper()) is not None:
            half.journal.recv(1)
            os._exit(0)
        assert not journal.is_alone()
        successor = journal.state()[0]
        assert successor not in (mortal, None)
    os.waitpid(successor, 0)


def test_an_upgrade_of_which_the_keeper_died_is_answered(folder: Path, mortal: int) -> None:
    """And the next keeper is not asked for it, which might die of it, too."""
    with alone(folder, mortal) as (server, journal, keeper):
        assert not journal.command("upgrade", "session", 1)
        keeper.close()
        journal.note_signal(signal.SIGTERM, None)  # so there is no next one
        assert journal.replace_keeper() is None
        assert server.notes["upgrade"] == "the keeper died meanwhile"
        assert not journal._asked


def test_a_dead_keeper_need_not_be_told(folder: Path, mortal: int) -> None:
    """The next one is a fork of the server, and knows the policy; the server must not end."""
    with alone(folder, mortal) as (_, journal, keeper):
        keeper.close()
        journal.hello()
        journal.keep_policy(b"")
        assert journal.is_alone()


def test_the_lines_that_the_keeper_lost_are_counted(folder: Path) -> None:
    with alone(folder) as (server, _, keeper):
        lost = server.stats().log_dropped
        for count in (2, 7):
            keeper.send(encode_letter(Note("ping", id=count)))
            server.loop.turn()
        assert server.stats().log_dropped == lost + 7
