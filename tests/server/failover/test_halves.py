"""halves: either half is killed, and nothing that was acknowledged is lost."""

from __future__ import annotations

import os
import select
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
from breaking import (
    Half,
    Halves,
    identities,
    identity,
    resident,
)
from conftest import wait_until
from nursery import Manager

from fdshare.client.blocking.client import Client
from fdshare.client.watch_state import Snapshot
from fdshare.errors import (
    NameNotFound,
)
from fdshare.kernel.credentials import peer_credentials
from fdshare.kernel.endpoint import connect
from server.orders import ALL, SOME, deaths


def table(client: Client) -> list[tuple[Any, ...]]:
    """All that must survive of each entry."""
    return [
        (e.name, e.generation, e.kind, e.registrant, e.count, e.lifetime, e.grace, e.metadata)
        for e in client.infos()
    ]


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
    # What a former life leaves in cycles goes with the next collection, late where there is no GIL.
    assert min(sizes[50:]) < sizes[10] + (4 << 20)
    os.close(read)
    os.close(write)


def test_the_fixed_descriptors_are_these(manager: Manager, halves: Halves) -> None:
    """Counted by what they are, so that the census of the others means something."""
    for half in ("server", "keeper"):
        halves.kill(half)
    keeper = halves.fixed()
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
