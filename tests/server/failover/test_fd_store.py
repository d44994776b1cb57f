"""The table in a service manager's store: the tests play systemd's part (service_manager.py)."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from commandline import Shell
from service_manager import Manager, ServiceManager

from fdshare import connect
from fdshare.activation import store
from fdshare.kernel import open_file
from fdshare.kernel.descriptor import Descriptor
from fdshare.protocol.messages import Kind, Registrant, StoreStats
from fdshare.server.core.image import image_of
from fdshare.server.core.records import Drop, Grant, Move, Put, Record
from fdshare.server.core.table import Table
from fdshare.server.failover import fd_store
from fdshare.server.failover.fd_store import FdStore
from fdshare.server.failover.labels import PAGE, TABLE
from fdshare.server.failover.table_file import Step, UnreadableTable
from fdshare.server.loop.closing import Handle

Until = Callable[..., Any]
# What the server stores beside its entries, as `names()` sorts it.
OWN = [PAGE, TABLE]


@pytest.fixture
def manager(folder: Path) -> Iterator[Manager]:
    manager = Manager(folder)
    yield manager
    manager.close()


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
    assert manager.names() == OWN
    shell("register", "one", "--memory", "/dev/null")
    shell("register", "one", "--memory", "/dev/null", "--replace")
    until(lambda: len(manager.names()) == 3, "the first is gone")
    shell("take", "one", "--cat")
    until(lambda: manager.names() == OWN, "the second, and its lease")


@pytest.mark.parametrize("half", ["server_pid", "keeper_pid"])
def test_the_death_of_one_half_is_no_matter(manager: Manager, half: str, until: Until) -> None:
    shell = manager.shell
    manager.start()
    shell("register", "one", "--memory", "/dev/null")
    os.kill(shell.json("stats")[half], signal.SIGKILL)
    shell("register", "two", "--memory", "/dev/null")
    shell("rm", "one")
    until(lambda: len(manager.names()) == 3, "one entry, the table and the page")
    until(lambda: shell.json("stats")["redundant"], "both halves are there again")
    manager.kill_all()
    manager.start()
    assert [entry["name"] for entry in shell.json("ls")] == ["two"]
    assert "its service manager holds everything" in shell.run("stop").stderr


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


def test_an_open_file_under_two_names_comes_back_under_both(manager: Manager) -> None:
    manager.start()
    with connect(manager.shell.path) as client:
        with open(os.memfd_create("shared"), "rb") as file:
            for name in ("one", "two", "three"):
                client.register(name, file)
        client.unregister("one")
        before = {name: inode(manager.shell, name) for name in ("two", "three")}
    assert len(manager.names()) == 3
    manager.kill_all()
    manager.start()
    assert {name: inode(manager.shell, name) for name in ("two", "three")} == before
    # It is one open file description still.
    with connect(manager.shell.path) as client:
        client.unregister("two")
        assert len(manager.names()) == 3
        client.unregister("three")
    assert manager.names() == OWN


def test_what_finds_no_room_is_told_and_stored_when_there_is(manager: Manager) -> None:
    shell = manager.shell
    manager.store.limit = 4
    manager.start()
    for name in ("one", "two", "three", "four"):
        shell("register", name, "--memory", "/dev/null")
    assert [entry["stored"] for entry in shell.json("ls")] == [False, True, False, True]
    assert "(not stored)" in shell("ls", "three")
    assert "not stored" not in shell("ls", "one")
    assert "stored        no" in shell("info", "three")
    assert "4 descriptors of 4, 2 names are not in it" in shell("stats")
    assert "fdshare_missing_names 2\n" in shell("stats", "--prometheus")
    doctor = shell("doctor", "--json", status=1)
    assert "FileDescriptorStoreMax" in doctor
    shell("rm", "one")
    assert shell.json("info", "three")["stored"]
    # A replacement finds the room of what it replaces.
    shell("register", "two", "--memory", "/dev/null", "--replace")
    missing = [entry["name"] for entry in shell.json("ls") if not entry["stored"]]
    assert missing == ["two"]
    manager.kill_all()
    manager.start()
    assert [entry["name"] for entry in shell.json("ls")] == ["four", "three"]


def test_an_upgrade_to_code_that_cannot_read_the_store_is_refused(manager: Manager) -> None:
    shell = manager.shell
    manager.start()
    shell("register", "one", "--memory", "/dev/null")
    with manager.lock:
        memfd = dict(manager.store.held)[TABLE].fileno()
        os.pwrite(memfd, (99).to_bytes(8, sys.byteorder), 8)
    assert "it has version 99" in shell.fails("upgrade")
    assert [entry["name"] for entry in shell.json("ls")] == ["one"]
    # Nor does a successor read it: it serves what it holds, and leaves the store alone.
    before = manager.names()
    os.kill(shell.json("stats")["server_pid"], signal.SIGKILL)
    shell("register", "two", "--memory", "/dev/null")
    assert [entry["name"] for entry in shell.json("ls")] == ["one", "two"]
    assert shell.json("stats")["store"] is None
    assert manager.names() == before


# The store alone.


@pytest.fixture
def played(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ServiceManager]:
    made = ServiceManager(folder)
    monkeypatch.setenv("NOTIFY_SOCKET", made.sock.address)
    yield made
    made.close()


@pytest.fixture
def fdstore(played: ServiceManager) -> Iterator[FdStore]:
    made = FdStore.new("epoch", played.store.limit)
    yield made
    made.memfd.close()


@pytest.fixture
def files() -> Iterator[list[int]]:
    """Descriptors, each of an open file description of its own."""
    made = [os.memfd_create(str(number)) for number in range(8)]
    yield made
    for fd in made:
        os.close(fd)


def put(name: str, generation: int, count: int = 1) -> Record:
    change = Put(name, generation, Kind("descriptor", b"\xc0"), count, Registrant(1, 0, 0), 0.0)
    return Record([change], "session", generation, b"answer")


def drop(name: str, generation: int) -> Record:
    return Record([Drop(name, generation, "unregistered")])


def again(fdstore: FdStore) -> FdStore:
    """Another one, that reads the same memfd."""
    return FdStore(fdstore.memfd, fdstore.limit)


def labels(fdstore: FdStore, name: str) -> list[str]:
    """Those of an entry's handles."""
    return [use.label for use in fdstore.held.entries[name].all_handles()]


def state(fdstore: FdStore) -> tuple[object, ...]:
    image, uses = image_of(fdstore.held)
    return msgspec.msgpack.encode(image), [use.label for use in uses], fdstore.epoch


def passed(played: ServiceManager) -> dict[str, list[Descriptor]]:
    """Copies of all that is stored, but for the table."""
    played.names()  # waits
    found: dict[str, list[Descriptor]] = {}
    for label, descriptor in played.store.held:
        if label != TABLE:
            found.setdefault(label, []).append(descriptor.dup())
    return found


def contents(table: Table) -> dict[str, list[str]]:
    """What the handles of each entry are open on; closes them."""
    found = {}
    for name, entry in table.entries.items():
        found[name] = [os.readlink(f"/proc/self/fd/{h.fd}")[7:8] for h in entry.handles]
    for handle in table.handles():
        os.close(handle.fd)
    return found


def test_what_is_written_is_read(fdstore: FdStore, files: list[int]) -> None:
    fdstore.record(put("a", 1, 2), files[:2])
    fdstore.record(put("b", 2), files[2:3])
    fdstore.record(Record([Move("a", "c", 3)]), [])
    fdstore.record(Record([Grant("c", 7, 1.0)]), files[3:4])
    fdstore.record(drop("b", 2), [])
    assert state(again(fdstore)) == state(fdstore)
    assert len(set(labels(fdstore, "c"))) == 3
    assert fdstore.held.answers["session"] == {1: b"answer", 2: b"answer"}


def test_the_service_manager_holds_what_the_table_does(
    fdstore: FdStore, played: ServiceManager, files: list[int]
) -> None:
    fdstore.record(put("a", 1, 2), files[:2])
    fdstore.record(put("b", 2), files[2:3])
    fdstore.record(drop("a", 1), [])
    assert played.names() == sorted([TABLE, *labels(fdstore, "b")])
    assert contents(again(fdstore).restore(passed(played))) == {"b": ["2"]}


def test_an_open_file_description_has_one_label(
    fdstore: FdStore, played: ServiceManager, files: list[int]
) -> None:
    first, second, third, fourth = (os.dup(files[0]) for _ in range(4))
    fdstore.record(put("a", 1), [first])
    fdstore.record(put("b", 2), [second])
    assert labels(fdstore, "a") == labels(fdstore, "b")
    assert fdstore.stats().descriptors == 2
    fdstore.record(drop("a", 1), [])
    os.close(first)  # as the server does
    assert contents(again(fdstore).restore(passed(played))) == {"b": ["0"]}
    fdstore.record(put("c", 3), [third])
    assert labels(fdstore, "c") == labels(fdstore, "b")
    fdstore.record(put("c", 4), [fourth])  # replaced by itself
    os.close(third)
    fdstore.record(drop("b", 2), [])
    assert contents(again(fdstore).restore(passed(played))) == {"c": ["0"]}
    fdstore.record(drop("c", 4), [])
    assert played.names() == [TABLE]
    os.close(second)
    os.close(fourth)


def test_labels_are_used_again(fdstore: FdStore, files: list[int]) -> None:
    seen = set()
    for generation in range(1, 400):
        fdstore.record(put("name", generation), [files[generation % 2]])
        seen |= set(labels(fdstore, "name"))
    assert len(seen) == 2


def test_nothing_is_beyond_the_limit(
    fdstore: FdStore, played: ServiceManager, files: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    played.store.limit = fdstore.limit = 3
    for at, name in enumerate("abcd"):
        fdstore.record(put(name, at + 1), [files[at]])
    assert [fdstore.stored(name) for name in "abcdx"] == [True, True, False, False, None]
    assert "'c' is not in the store" in caplog.text
    assert (fdstore.stats().descriptors, fdstore.stats().missing) == (3, 2)
    assert contents(again(fdstore).restore(passed(played))) == {"a": ["0"], "b": ["1"]}
    # Whoever waits longest comes first, also after the death of the server.
    fdstore.record(drop("b", 2), [])
    assert [fdstore.stored(name) for name in "acd"] == [True, True, False]
    later = again(fdstore)
    assert [later.stored(name) for name in "acd"] == [True, True, False]
    table = Table()
    for at, name in ((0, "a"), (2, "c"), (3, "d")):
        table.apply(put(name, at + 1), [Handle(files[at])])
    later.reconcile(table)
    assert later.stats() == fdstore.stats()
    played.store.limit = 4
    later.try_again(4, None)
    assert later.stored("d")
    assert again(later).stats() == later.stats()
    assert contents(again(later).restore(passed(played))) == {"a": ["0"], "c": ["2"], "d": ["3"]}


def test_nothing_is_beyond_what_can_come_back(
    fdstore: FdStore, played: ServiceManager, files: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """More labels than LISTEN_FDNAMES may have would be the end of every start."""
    monkeypatch.setattr(fd_store, "BUDGET", 12)  # for two labels
    for at, name in enumerate("abc"):
        fdstore.record(put(name, at + 1), [files[at]])
    assert [fdstore.stored(name) for name in "abc"] == [True, True, False]
    table = Table()
    for at, name in enumerate("abc"):
        table.apply(put(name, at + 1), [Handle(files[at])])
    later = again(fdstore)  # it knows how much is spent
    later.reconcile(table)
    later.record(put("d", 4), [files[3]])
    assert [later.stored(name) for name in "abcd"] == [True, True, False, False]
    later.record(drop("a", 1), [])
    assert [later.stored(name) for name in "bcd"] == [True, True, False]
    assert contents(again(later).restore(passed(played))) == {"b": ["1"], "c": ["2"]}


def test_what_is_held_under_a_label_that_nobody_wrote_down_is_let_go_first(
    fdstore: FdStore, played: ServiceManager, files: list[int]
) -> None:
    """Its server died between the two. A label with two descriptors would be none."""
    fdstore.record(put("a", 1), [files[0]])
    (label,) = labels(fdstore, "a")
    store(f"{label[:-1]}1", [files[7]], timeout=20)  # the next one that is free
    later = again(fdstore)
    later.record(put("b", 2), [files[1]])
    assert labels(later, "b") == [f"{label[:-1]}1"]
    assert contents(again(later).restore(passed(played))) == {"a": ["0"], "b": ["1"]}


def test_a_label_that_was_let_go_is_not_let_go_again(fdstore: FdStore, files: list[int]) -> None:
    fdstore.record(put("a", 1), [files[0]])
    fdstore.record(drop("a", 1), [])
    told = fdstore.told
    fdstore.record(put("b", 2), [files[1]])
    assert fdstore.told == told + 1


def test_a_replacement_at_the_limit_takes_the_place(
    fdstore: FdStore, played: ServiceManager, files: list[int]
) -> None:
    played.store.limit = fdstore.limit = 2
    fdstore.record(put("a", 1), [files[0]])
    fdstore.record(put("a", 2), [files[1]])
    assert fdstore.stored("a")
    assert contents(again(fdstore).restore(passed(played))) == {"a": ["1"]}


def test_a_store_without_room_for_anything(
    played: ServiceManager, files: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    played.store.limit = 0
    fdstore = FdStore.new("epoch", 0)
    with fdstore.memfd:
        assert "FileDescriptorStoreMax= is 0" in caplog.text
        fdstore.record(put("a", 1), [files[0]])
        assert not fdstore.stored("a")
        assert fdstore.stats() == StoreStats(0, 0, 1)
        played.store.limit = 9
        fdstore.try_again(9, 0)
        assert fdstore.stats() == StoreStats(2, 9, 0)
        assert contents(again(fdstore).restore(passed(played))) == {"a": ["0"]}


def test_what_the_service_manager_dropped_is_stored_again(
    fdstore: FdStore, played: ServiceManager, files: list[int]
) -> None:
    for at, name in enumerate("abc"):
        fdstore.record(put(name, at + 1), [files[at]])
    played.names()
    with played.lock:
        played.store.limit = 3
        for label in (TABLE, *labels(fdstore, "b")):
            played.store.remove(label)
    fdstore.try_again(3, 2)
    assert TABLE in played.names()
    stored = [name for name in "abc" if fdstore.stored(name)]
    assert len(stored) == 2
    assert sorted(contents(again(fdstore).restore(passed(played)))) == stored


def test_a_service_manager_that_does_not_read_is_asked_again(
    fdstore: FdStore,
    played: ServiceManager,
    files: list[int],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    address = os.environ["NOTIFY_SOCKET"]
    fdstore.record(put("a", 1), [files[0]])
    fdstore.record(put("b", 2), [files[1]])
    monkeypatch.setenv("NOTIFY_SOCKET", address + ".gone")
    fdstore.record(put("c", 3), [files[2]])
    fdstore.record(drop("a", 1), [])
    assert not fdstore.stored("c")
    assert caplog.text.count("was not told") == 1  # it is left alone for a while
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    fdstore.try_again(fdstore.limit, None)
    assert fdstore.stored("c")
    assert contents(again(fdstore).restore(passed(played))) == {"b": ["1"], "c": ["2"]}


def test_what_is_held_under_an_old_label_is_offered_when_that_is_gone(
    fdstore: FdStore, played: ServiceManager, files: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the service manager would drop the new one, and then be told to close the old one."""
    address = os.environ["NOTIFY_SOCKET"]
    copy = os.dup(files[0])
    fdstore.record(put("a", 1), [files[0]])
    monkeypatch.setenv("NOTIFY_SOCKET", address + ".gone")
    fdstore.record(drop("a", 1), [])
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    monkeypatch.setattr(fdstore, "_silent_until", 0.0)
    fdstore.record(put("b", 2), [copy])
    assert fdstore.stored("b")
    assert contents(again(fdstore).restore(passed(played))) == {"b": ["0"]}
    os.close(copy)


def test_the_number_of_a_label_that_is_still_held_is_not_used(
    fdstore: FdStore, played: ServiceManager, files: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    address = os.environ["NOTIFY_SOCKET"]
    fdstore.record(put("a", 1), [files[0]])
    monkeypatch.setenv("NOTIFY_SOCKET", address + ".gone")
    fdstore.record(drop("a", 1), [])
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    # Its server dies here, and nobody tells the service manager.
    later = again(fdstore)
    table = Table()
    table.apply(put("b", 2), [Handle(files[1])])
    later.reconcile(table)
    assert contents(again(later).restore(passed(played))) == {"b": ["1"]}
    assert later.stats().descriptors == 2


def test_a_successor_knows_all_that_may_still_be_held(
    fdstore: FdStore, played: ServiceManager, files: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the service manager did not hear: else it would drop what is open already under
    such a label, and that would count as stored."""
    address = os.environ["NOTIFY_SOCKET"]
    copies = [os.dup(fd) for fd in files]
    fdstore.record(put("z", 1), [files[0]])
    fdstore.record(drop("z", 1), [])  # whose label is used again
    for at, name in enumerate("abc"):
        fdstore.record(put(name, at + 1), [copies[at]])
    monkeypatch.setenv("NOTIFY_SOCKET", address + ".gone")
    for at, name in enumerate("abc"):
        fdstore.record(drop(name, at + 1), [])
    later = again(fdstore)
    later.reconcile(Table())  # it writes what may be held, and is not heard either
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    last = again(later)
    assert last.stats() == later.stats() == fdstore.stats() == StoreStats(4, last.limit, 0)
    last.reconcile(Table())
    last.record(put("web", 4), [files[1]])
    assert last.stored("web")
    assert contents(again(last).restore(passed(played))) == {"web": ["1"]}
    for fd in copies:
        os.close(fd)


def test_a_successor_lets_go_of_nothing_twice(fdstore: FdStore, files: list[int]) -> None:
    for at, name in enumerate("abcd"):
        fdstore.record(put(name, at + 1), [files[at]])
    for at, name in enumerate("abc"):
        fdstore.record(drop(name, at + 1), [])
    fdstore.record(put("e", 5), [files[4]])  # under the label that was a's
    later = again(fdstore)
    assert later.stats() == fdstore.stats()
    assert labels(later, "e") == [f"{labels(later, 'd')[0][:-1]}0"]


def test_a_label_that_is_used_again_is_not_let_go(
    fdstore: FdStore, played: ServiceManager, files: list[int]
) -> None:
    """Although no frame says that it was let go before."""
    table = Table()
    fdstore.record(put("a", 1), [files[0]])
    fdstore.record(drop("a", 1), [])
    fdstore._gone = []
    fdstore.record(put("b", 2), [files[1]])
    table.apply(put("b", 2), [Handle(files[1])])
    later = again(fdstore)
    later.reconcile(table)
    assert contents(again(later).restore(passed(played))) == {"b": ["1"]}


def test_reconciling_keeps_the_labels_of_what_is_known(
    fdstore: FdStore, played: ServiceManager, files: list[int]
) -> None:
    table = Table()
    for record, fds in ((put("a", 1), files[:1]), (put("b", 2, 2), files[1:3])):
        table.apply(record, [Handle(fd) for fd in fds])
        fdstore.record(record, fds)
    known = labels(fdstore, "b")
    # What the predecessor did and did not come to write:
    table.apply(drop("a", 1), [])
    table.apply(put("c", 3), [Handle(files[3])])
    later = again(fdstore)
    later.reconcile(table)
    assert labels(later, "b") == known
    assert state(again(later)) == state(later)
    assert contents(again(later).restore(passed(played))) == {"b": ["1", "2"], "c": ["3"]}
    assert len(played.names()) == 4


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether nothing more can be written, as at the limit of a cgroup."""
    full = [False]
    write = os.pwrite

    def pwrite(fd: int, data: bytes, at: int) -> int:
        if full[0]:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return write(fd, data, at)

    monkeypatch.setattr(os, "pwrite", pwrite)
    return full


def test_what_could_not_be_written_is_written_later(
    fdstore: FdStore,
    played: ServiceManager,
    files: list[int],
    full: list[bool],
    caplog: pytest.LogCaptureFixture,
) -> None:
    table = Table()

    def change(record: Record, *fds: int) -> None:
        fdstore.record(record, fds)
        table.apply(record, [Handle(fd) for fd in fds])

    change(put("a", 1), files[0])
    change(put("b", 2), files[1])
    full[0] = True
    change(put("c", 3), files[2])
    assert fdstore.stale
    assert "Cannot allocate memory" in caplog.text
    # Nothing is written that does not follow from what is there.
    change(drop("c", 3))
    change(drop("a", 1))
    change(put("d", 4), files[3])
    full[0] = False
    change(put("e", 5), files[4])
    change(put("g", 6), files[0])  # the number that was a's
    assert not any(fdstore.stored(name) for name in "abcdeg")
    assert fdstore.stats().missing == 2
    assert sorted(again(fdstore).held.entries) == ["a", "b"]
    full[0] = True
    fdstore.reconcile(table)
    assert fdstore.stale
    fdstore.try_again(fdstore.limit, 0)
    full[0] = False
    fdstore.reconcile(table)
    assert not fdstore.stale
    assert all(fdstore.stored(name) for name in "bdeg")
    change(put("f", 7), files[5])
    assert len(played.names()) == fdstore.stats().descriptors == 6
    found = contents(again(fdstore).restore(passed(played)))
    assert found == {"b": ["1"], "d": ["3"], "e": ["4"], "g": ["0"], "f": ["5"]}


def test_a_successor_that_cannot_write_serves(
    fdstore: FdStore, files: list[int], full: list[bool]
) -> None:
    fdstore.record(put("a", 1), [files[0]])
    full[0] = True
    later = again(fdstore)
    later.reconcile(Table())
    assert later.stale
    full[0] = False
    later.reconcile(Table())
    assert not later.stale


def test_what_is_offered_again_and_cannot_be_written_is_no_matter(
    fdstore: FdStore, files: list[int], full: list[bool]
) -> None:
    fdstore.limit = 1
    fdstore.record(put("a", 1), [files[0]])
    full[0] = True
    fdstore.try_again(9, None)
    assert fdstore.stale


def test_records_that_do_not_follow_cannot_be_read(fdstore: FdStore) -> None:
    fdstore._file.append(Step(drop("a", 1), []))
    with pytest.raises(UnreadableTable, match="KeyError"):
        again(fdstore)


def restored_without(
    fdstore: FdStore, played: ServiceManager, lost: list[str]
) -> dict[str, list[str]]:
    found = passed(played)
    for label in lost:
        for descriptor in found.pop(label):
            descriptor.close()
    return contents(again(fdstore).restore(found))


def test_what_was_not_held_is_lost_alone(
    fdstore: FdStore, played: ServiceManager, files: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    for at, name in enumerate("abc"):
        fdstore.record(put(name, at + 1), [files[at]])
    lost = labels(fdstore, "b")
    assert restored_without(fdstore, played, lost) == {"a": ["0"], "c": ["2"]}
    assert "'b' is lost" in caplog.text


def test_an_entry_whose_lease_was_not_held_is_back(
    fdstore: FdStore, played: ServiceManager, files: list[int]
) -> None:
    fdstore.record(put("a", 1), [files[0]])
    fdstore.record(Record([Grant("a", 1, 1.0)]), [files[1]])
    fdstore.record(put("b", 2), [files[2]])
    lease = labels(fdstore, "a")[1:]
    assert restored_without(fdstore, played, lease) == {"a": ["0"], "b": ["2"]}
    # And one that is lost takes its lease along.
    entry = labels(fdstore, "a")[:1]
    assert restored_without(fdstore, played, entry) == {"b": ["2"]}


def test_what_no_entry_uses_is_let_go(
    fdstore: FdStore, played: ServiceManager, files: list[int]
) -> None:
    fdstore.record(put("a", 1), [files[0]])
    store(".xyz0", [files[1]])
    assert contents(again(fdstore).restore(passed(played))) == {"a": ["0"]}
    assert ".xyz0" not in played.names()


def test_two_descriptors_of_one_label_are_none(
    fdstore: FdStore, played: ServiceManager, files: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    for at, name in enumerate("ab"):
        fdstore.record(put(name, at + 1), [files[at]])
    (label,) = labels(fdstore, "a")
    store(label, [files[2]])
    assert contents(again(fdstore).restore(passed(played))) == {"b": ["1"]}
    assert f"2 descriptors came back as {label}" in caplog.text
    assert label not in played.names()


def test_without_kcmp_everything_has_its_own_label(
    fdstore: FdStore,
    files: list[int],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(open_file, "_SYS_KCMP", None)  # as on an architecture that is not known
    later = again(fdstore)
    table = Table()
    for at, name in enumerate("ab"):
        table.apply(put(name, at + 1), [Handle(files[0])])
    later.reconcile(table)
    assert labels(later, "a") != labels(later, "b")
    assert "kcmp" in caplog.text
