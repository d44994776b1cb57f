"""The seven ways in which the closest existing holder of descriptors was broken within an hour."""

from __future__ import annotations

import os
import resource
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from breaking import Halves, Wire, cpu_seconds, identity
from conftest import wait_until
from nursery import Manager

from fdshare.client.blocking.client import Client
from fdshare.errors import (
    AddressInUse,
    DescriptorLimit,
    FdshareError,
    QuotaExceeded,
)
from fdshare.kernel.endpoint import connect
from fdshare.protocol import messages as m

KIND = m.Kind("fd", m.encode({}))


@pytest.fixture
def fd() -> Iterator[int]:
    fd = os.memfd_create("held")
    yield fd
    os.close(fd)


@pytest.fixture(params=[True, False], ids=["keeper", "no keeper"])
def keeper(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def idles(pid: int) -> bool:
    """True if the process uses next to no time of the processor."""
    used, since = cpu_seconds(pid), time.monotonic()
    wait_until(lambda: time.monotonic() > since + 0.3)
    return cpu_seconds(pid) - used < 0.1


# 1. Equal deadlines, and then a delete, made it spin for ever.


def test_equal_deadlines_then_delete(keeper: bool, fd: int, counted: dict[str, Any]) -> None:
    with Manager(keeper=keeper) as manager:
        with Client(manager.address) as client:
            for index in range(200):
                # In one write, so that the server's clock stands still between them.
                client.register(f"n/{index}", fd, ttl=1.0)
        with Wire(manager.address, "batch") as wire:
            for index in range(200):
                wire.send(index + 1, m.Register(f"b/{index}", KIND, ttl=0.5), [fd])
            for index in range(0, 200, 3):
                wire.send(1000 + index, m.Unregister(f"b/{index}"))
            for _ in range(200 + 67):
                assert not isinstance(wire.receive().reply, m.Refused)
        for index in range(0, 200, 3):
            manager.unregister(f"n/{index}")
        wait_until(lambda: manager.names() == [])
        assert idles(manager.stats().server_pid)
        counted["deadlines"] = 400


# 2. EMFILE in accept made it lose everything.


def test_emfile_in_accept(keeper: bool, fd: int, counted: dict[str, Any]) -> None:
    with Manager(keeper=keeper) as manager, Client(manager.address) as admin:
        for index in range(50):
            manager.register(f"n/{index}", fd)
        admin.ping()
        pid = manager.stats().server_pid
        soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        idle = [connect(manager.address) for _ in range(20)]
        wait_until(lambda: admin.stats().connections == 22)
        # No number is left: not for accept, and not for what a client sends.
        highest = max(int(n) for n in os.listdir(f"/proc/{pid}/fd"))
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (highest + 1, hard))
        knocking = [connect(manager.address) for _ in range(30)]
        with pytest.raises(DescriptorLimit, match="of the server"):
            while True:
                admin.register("more", fd, replace=True)
                admin.register("even more", fd, replace=True)
                highest = max(int(n) for n in os.listdir(f"/proc/{pid}/fd"))
                resource.prlimit(pid, resource.RLIMIT_NOFILE, (highest + 1, hard))
        for index in range(50):
            with admin.fetch_raw(f"n/{index}")[0] as descriptor:
                assert identity(descriptor) == identity(fd)
        assert idles(pid)
        for sock in idle + knocking:
            sock.close()
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))
        with Client(manager.address) as late:
            assert len(late.names("n/*")) == 50
        counted.update(knocked=30, evicted=admin.stats().counters["evicted"])
        assert admin.stats().server_pid == pid


# 3. At its limit it could neither list nor delete.


def test_at_the_limit(keeper: bool, fd: int, counted: dict[str, Any]) -> None:
    with Manager(keeper=keeper, limits={"max_names": 20, "max_descriptors": 30}) as manager:
        for index in range(20):
            manager.register(f"n/{index}", fd)
        with pytest.raises(QuotaExceeded, match="max_names") as caught:
            manager.register("more", fd)
        assert (caught.value.what, caught.value.limit, caught.value.used) == ("max_names", 20, 20)
        work_as_usual(manager, fd)
        # Descriptors: 18 more make 38 of 30.
        with Wire(manager.address, "many") as wire:
            replace = m.Register("n/0", KIND, replace=True)
            error = wire.refused(1, replace, [fd] * 12)
            assert isinstance(error, QuotaExceeded)
            assert (error.what, error.limit, error.used) == ("max_descriptors", 30, 19)
            wire.ask(2, replace, [fd] * 11)
        work_as_usual(manager, fd, descriptors=30)
        with pytest.raises(QuotaExceeded, match="max_descriptors"):
            manager.unregister("n/1")
            manager.register("n/1", fd, lifetime="process")  # its pidfd is one more
        manager.register("n/1", fd)
        counted["at the limit"] = manager.stats().descriptors


def work_as_usual(manager: Manager, fd: int, descriptors: int = 20) -> None:
    """Everything but a new entry."""
    names = manager.names()
    assert len(names) == 20
    assert manager.stats().descriptors == descriptors
    assert len(manager.infos()) == 20
    for name in names:
        for descriptor in manager.fetch_raw(name):
            descriptor.close()
    manager.register(names[5], fd, replace=True)
    manager.rename(names[5], "x")
    manager.rename("x", names[5])
    if descriptors < 30:  # a lease is a descriptor, too
        manager.take_raw(names[6])[0].close()
    else:
        manager.unregister(names[6])
    manager.register(names[6], fd)
    manager.unregister(names[7])
    manager.register(names[7], fd)


# 4. Sixteen idle clients shut the door.


@pytest.mark.parametrize("count", [16, 1000])
def test_idle_clients(keeper: bool, fd: int, counted: dict[str, Any], count: int) -> None:
    with Manager(keeper=keeper, limits={"max_connections": count}) as manager:
        manager.register("a", fd)
        idle = [Wire(manager.address, f"idle {index}") for index in range(count * 2)]
        with Client(manager.address) as late:
            late.fetch_raw("a")[0].close()
            stats = late.stats()
        assert stats.connections <= count
        assert stats.counters["evicted"] >= count
        # Who was evicted is served as soon as it comes again, by itself.
        assert manager.names() == ["a"]
        counted.update(idle=len(idle), evicted=stats.counters["evicted"])
        for wire in idle:
            wire.close()


# 5. A restore whose k-th entry was bad lost what was there.


def test_a_bad_entry_in_what_is_handed_over(keeper: bool, fd: int, counted: dict[str, Any]) -> None:
    """There is no restore verb; the nearest is a batch of registers, of which each is one step."""
    with Manager(keeper=keeper) as manager:
        for index in range(10):
            manager.register(f"n/{index}", fd)
        for bad in range(10):
            with Wire(manager.address, f"batch {bad}") as wire:
                for index in range(10):
                    request = m.Register(f"n/{index}", KIND, replace=True)
                    fds = [fd]
                    if index == bad:
                        request, fds = m.Register("", KIND), [fd, fd]
                    wire.send(index + 1, request, fds)
                said = {answer.id: answer.reply for answer in (wire.receive() for _ in range(10))}
            refused = [id for id, reply in said.items() if isinstance(reply, m.Refused)]
            assert refused == [bad + 1]
            assert len(manager.names()) == 10
        counted["batches"] = 10


# 6. A taker that died before it read lost the entry.


def test_a_taker_dies_unread(keeper: bool, fd: int, counted: dict[str, Any]) -> None:
    with Manager(keeper=keeper) as manager:
        generation = manager.register("a", fd).generation
        for index in range(100):
            with Wire(manager.address) as wire:
                wire.send(1, m.Take("a", 10.0))
                if index % 2:
                    select.select([wire.sock], [], [])
            wait_until(lambda: manager.names() == ["a"])
            assert manager.info("a").generation == generation
        counted["takers"] = 100


# 7. A second daemon stole the path.


def test_a_second_server_on_a_live_path(folder: Path, fd: int, keeper: bool) -> None:
    with Manager(folder / "s", keeper=keeper) as manager:
        manager.register("a", fd)
        pid = manager.stats().keeper_pid or manager.stats().server_pid
        with pytest.raises(AddressInUse) as caught:
            Manager(folder / "s").start()
        assert caught.value.pid == pid
        assert str(pid) in str(caught.value)
        if keeper:
            halves = Halves(manager)
            halves.kill("keeper")
            halves.kill("server")
            with pytest.raises(AddressInUse) as caught:
                Manager(folder / "s").start()
            assert caught.value.pid == halves.pids()["keeper"]
        assert manager.names() == ["a"]


STARTER = """
import sys
from fdshare.errors import AddressInUse
from fdshare.kernel.endpoint import listen

for line in sys.stdin:
    try:
        listener = listen(line.strip())
    except AddressInUse:
        print("lost", flush=True)
    else:
        print("won", flush=True)
        sys.stdin.readline()
        listener.close()
        print("closed", flush=True)
"""


def test_two_starters_on_a_stale_path(
    folder: Path, times: Callable[[int], int], counted: dict[str, Any]
) -> None:
    """Exactly one of them has it, and is reached under it."""
    starters = [
        subprocess.Popen(
            [sys.executable, "-c", STARTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for _ in range(2)
    ]
    wins = [0, 0]
    for index in range(times(100)):
        path = folder / f"{index}"
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(str(path))
            stale.listen()
        for starter in starters:
            say(starter, str(path))
        said = [hear(starter) for starter in starters]
        assert sorted(said) == ["lost", "won"]
        winner = said.index("won")
        wins[winner] += 1
        connect(path).close()
        say(starters[winner], "close")
        assert hear(starters[winner]) == "closed"
        assert not path.exists()
    counted["wins"] = wins
    for starter in starters:
        starter.communicate()


def say(process: subprocess.Popen[bytes], line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(f"{line}\n".encode())
    process.stdin.flush()


def hear(process: subprocess.Popen[bytes]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().decode().strip()


def test_two_servers_start_at_once(folder: Path, counted: dict[str, Any]) -> None:
    """Whole servers, and one of them is refused with the other's pid."""
    rounds = 5
    for index in range(rounds):
        path = folder / f"{index}"
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(str(path))
        command = [sys.executable, "-m", "fdshare", "serve", str(path), "--log-level", "error"]
        both = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(2)]
        # The refused one ends; the other serves.
        wait_until(lambda both=both: any(p.poll() is not None for p in both), "one is refused")
        (loser,) = [p for p in both if p.poll() is not None]
        (winner,) = [p for p in both if p is not loser]
        _, said = loser.communicate()
        assert loser.returncode != 0
        assert str(winner.pid).encode() in said

        def served(path: Path = path) -> bool:
            try:
                with Client(path) as client:
                    client.ping()
            except FdshareError:
                return False
            return True

        wait_until(served)
        winner.terminate()
        winner.communicate()
    counted["rounds"] = rounds
