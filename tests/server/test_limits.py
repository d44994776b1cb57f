"""Never wedged: every limit has its own error, and beside it everything else goes on."""

from __future__ import annotations

import errno
import math
import os
import re
import resource
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from barepeer import Peer
from breaking import Halves, Wire, cpu_seconds, identity
from conftest import wait_until
from nursery import Manager

from fdshare.client.blocking.client import Client
from fdshare.errors import DescriptorLimit, InvalidArgument, QuotaExceeded
from fdshare.kernel.endpoint import connect
from fdshare.protocol import messages as m
from fdshare.server.limits import RESERVE, Limits

KIND = m.Kind("fd", msgspec.Raw(m.encode({})))
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be other users")


@pytest.fixture
def fd() -> Iterator[int]:
    fd = os.memfd_create("held")
    yield fd
    os.close(fd)


# What they are.


@pytest.mark.parametrize("nofile", [64, 256, 1024, 20_000, 1 << 20])
def test_defaults_leave_head_room(nofile: int) -> None:
    limits = Limits.for_rlimit(nofile)
    assert limits.max_descriptors + limits.max_connections + RESERVE <= nofile
    assert limits.in_flight < nofile / 2
    assert limits.max_names_per_uid < limits.max_names
    assert limits.max_connections_per_uid < limits.max_connections


@pytest.mark.parametrize("wrong", [{"max_nmaes": 3}, {"max_names": 0}, {"in_flight": -1}])
@pytest.mark.parametrize("keeper", [True, False])
def test_limits_that_are_none(wrong: dict[str, float], keeper: bool) -> None:
    with pytest.raises(InvalidArgument, match=next(iter(wrong))):
        Manager(limits=wrong, keeper=keeper).start()


@pytest.mark.parametrize("value", [math.inf, math.nan, -math.inf, 1.5, "5", None, [1]])
def test_values_that_are_none(value: Any) -> None:
    with pytest.raises(InvalidArgument, match=f"max_names is {re.escape(repr(value))}, not a"):
        Limits.for_rlimit(1024, max_names=value)


@pytest.mark.parametrize("name", ["max_names", "lease_timeout"])
@pytest.mark.parametrize("value", [1 << 63, 1e20, 10**400])
def test_values_that_are_too_large(name: str, value: float) -> None:
    """They could be told to no client, and handed to no new code."""
    with pytest.raises(InvalidArgument, match=f"{name} is .*, at most 9223372036854775807"):
        Limits.for_rlimit(1024, **{name: value})
    assert Limits.for_rlimit(1024, **{name: (1 << 63) - 1})
    if isinstance(value, int):
        with pytest.raises(InvalidArgument, match=name):
            Manager(limits={name: value})


def test_a_time_may_have_no_end() -> None:
    assert Limits.for_rlimit(1024, lease_timeout=math.inf).lease_timeout == math.inf


def test_all_are_shown() -> None:
    wanted = {name: 7 + index for index, name in enumerate(Limits.__struct_fields__)}
    with Manager(limits=wanted) as manager:
        assert manager.stats().limits == wanted


# A server with few descriptors.


@pytest.mark.parametrize("nofile", [64, 200])
def test_full_of_everything(small: Callable[..., Client], fd: int, nofile: int) -> None:
    """Names, connections, and halves that die at the limit."""
    admin = small(nofile)
    limits = admin.stats().limits
    most = int(limits["max_names"])
    for index in range(most):
        admin.register(f"n/{index}", fd)
    with pytest.raises(QuotaExceeded) as caught:
        admin.register("more", fd)
    assert (caught.value.what, caught.value.limit, caught.value.used) == ("max_names", most, most)
    idle = [Wire(admin.address, f"{index}") for index in range(int(limits["max_connections"]) * 2)]
    halves = Halves(admin)
    for half in ("keeper", "server", "keeper", "server"):
        halves.kill(half)
        assert len(admin.names()) == most
        for index in (0, most - 1):
            with admin.fetch_raw(f"n/{index}")[0] as descriptor:
                assert identity(descriptor) == identity(fd)
        admin.infos()
        # A freed slot works, and no second one.
        admin.unregister("n/0")
        admin.register("n/0", fd)
        admin.register("n/1", fd, replace=True)
        with pytest.raises(QuotaExceeded):
            admin.register("more", fd)
    for wire in idle:
        wire.close()


def test_an_entry_too_large(small: Callable[..., Client], fd: int) -> None:
    """More descriptors than the server has numbers free: the kernel drops them, and it says so."""
    admin = small(64)
    with Wire(admin.address, "large") as wire:
        for id in range(1, 4):
            error = wire.refused(id, m.Register("a", KIND), [fd] * 200)
            assert isinstance(error, DescriptorLimit | QuotaExceeded)
        wire.ask(9, m.Register("a", KIND), [fd])
    assert admin.names() == ["a"]


def exhaust(pid: int) -> tuple[int, int]:
    """Leaves *pid* no number; the limits that it had."""
    former = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    numbers = {int(number) for number in os.listdir(f"/proc/{pid}/fd")}
    free = next(number for number in range(len(numbers) + 1) if number not in numbers)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (free, former[1]))
    return former


def test_no_number_is_free(fd: int) -> None:
    """Every verb that needs one is refused for it; the others work; nobody spins."""
    with Manager() as manager, Client(manager.address) as admin:
        halves = Halves(manager)
        manager.register("a", fd)
        admin.ping()
        server = halves.pids()["server"]
        former = exhaust(server)
        for refuse in (
            lambda: admin.register("b", fd),
            lambda: admin.take_raw("a"),
            lambda: admin.bind("c", "tcp://127.0.0.1:0"),
        ):
            with pytest.raises(DescriptorLimit, match="RLIMIT_NOFILE of the server") as caught:
                refuse()
            assert caught.value.whose == "server"
        with admin.fetch_raw("a")[0] as descriptor:
            assert identity(descriptor) == identity(fd)
        admin.rename("a", "b")
        assert admin.names() == ["b"]
        admin.infos()
        # An idle connection gives its number to one that knocks, so nobody knocks before.
        knocking = connect(manager.address)
        used, since = cpu_seconds(server), time.monotonic()
        wait_until(lambda: time.monotonic() > since + 0.3)
        assert cpu_seconds(server) - used < 0.15
        resource.prlimit(server, resource.RLIMIT_NOFILE, former)
        with Client(manager.address) as late:
            late.take_raw("b")[0].close()
        knocking.close()
        wait_until(lambda: manager.stats().connections <= 3)
        halves.check_census()


def test_a_keeper_without_numbers_makes_way(fd: int) -> None:
    """It cannot hold what the server holds: the server makes one that can."""
    with Manager() as manager:
        halves = Halves(manager)
        manager.register("a", fd)
        keeper = halves.pids()["keeper"]
        exhaust(keeper)
        manager.register("b", fd)
        wait_until(lambda: halves.pids()["keeper"] != keeper)
        halves.kill("server")
        assert manager.names() == ["a", "b"]


@pytest.mark.parametrize("nofile", range(8, 16))
def test_a_server_that_cannot_be_started_says_so(folder: Path, nofile: int) -> None:
    """Some have numbers for a keeper and none for its server."""
    ready, writes = os.pipe()
    serve = [sys.executable, "-m", "fdshare", "serve", str(folder / "s"), "--ready-fd", "1"]
    process = subprocess.Popen(
        ["sh", "-c", f'ulimit -n {nofile} && exec "$@"', "sh", *serve],
        stdin=subprocess.DEVNULL,
        stdout=writes,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writes)
    with open(ready, "rb") as said:
        serves = bool(said.read(1))
        process.terminate()
        _, error = process.communicate(timeout=60)
    assert (
        serves
        or "Too many open files" in error
        # The command itself may be the first that finds none.
        or f"RLIMIT_NOFILE of the command is {nofile}" in error
        or f"RLIMIT_NOFILE of the server is {nofile}" in error
    )


# In flight.


@needs_root
def test_in_flight_of_an_unprivileged_user(folder: Path) -> None:
    """Limit 64: who does not read has at most his budget, and another process of the same user
    that has used up all is no reason to fail, but to wait."""
    folder.chmod(0o777)
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        status = 1
        try:
            as_one(1500)
            os.close(read)
            in_flight(folder, write)
            status = 0
        except BaseException as error:
            os.write(write, "".join(traceback.format_exception(error)).encode())
        finally:
            os._exit(status)
    os.close(write)
    with open(read) as pipe:
        said = pipe.read()
    _, status = os.waitpid(pid, 0)
    assert status == 0, said


def in_flight(folder: Path, write: int) -> None:
    """Run as an unprivileged user."""
    from fdshare.server.serve import serve
    from fdshare.server.settings import Settings

    ready, here = os.pipe()
    ours, theirs = socket.socketpair()  # the server ends with this process
    server = os.fork()
    if not server:
        try:
            os.close(write)
            ours.close()
            resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
            settings = Settings(path=str(folder / "s"), log_level="ERROR")
            serve(settings, lambda: os.close(here), control=theirs)
        finally:
            os._exit(0)
    theirs.close()
    os.close(here)
    os.read(ready, 1)
    fd = os.memfd_create("x")
    with Client(folder / "s") as client:
        budget = client.stats().limits["in_flight"]
        assert budget < 32
        for index in range(10):
            client.register(f"n/{index}", fd)
        deaf = [Wire(str(folder / "s"), f"{index}") for index in range(6)]
        for wire in deaf:
            for id in range(1, 20):
                wire.send(id, m.Fetch(f"n/{id % 10}"))
        for index in range(50):
            client.fetch_raw(f"n/{index % 10}")[0].close()
        assert client.stats().in_flight <= budget
        client.register("while they are deaf", fd)
        for wire in deaf:
            for _ in range(19):
                for descriptor in wire.receive().descriptors:
                    descriptor.close()
            wire.close()
        hog(client, fd)
        client.shutdown()
    os.waitpid(server, 0)


def hog(client: Client, fd: int) -> None:
    """Somebody else of this user uses up what the kernel allows in flight; the server waits."""
    near, far = socket.socketpair()
    # In this process the limit is that of root: more than 64 go through.
    for _ in range(80):
        socket.send_fds(near, [b"x"], [fd])
    found: list[Any] = []
    threads = [
        threading.Thread(target=lambda: found.append(client.fetch_raw("n/1"))),
        threading.Thread(target=lambda: found.append(client.register("late", fd))),
    ]
    for thread in threads:
        thread.start()
    wait_until(lambda: client.ping() is None)
    assert not found
    near.close()
    far.close()  # what was in flight is gone
    for thread in threads:
        thread.join()
    assert len(found) == 2


# Each user's.


def as_user(uid: int, task: Callable[[], object]) -> str:
    """The repr of what *task* returns or raises, run as *uid*."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            as_one(uid)
            try:
                said = repr(task())
            except QuotaExceeded as error:
                said = f"{error.what} {error.limit} {error.used}"
            os.write(write, said.encode())
        finally:
            os._exit(0)
    os.close(write)
    with open(read) as pipe:
        said = pipe.read()
    os.waitpid(pid, 0)
    return said


@pytest.fixture
def shared(folder: Path) -> Iterator[Manager]:
    """Anybody may register and fetch."""
    (folder / "policy").write_text(
        '[[rule]]\neffect = "allow"\nverbs = ["register", "fetch", "unregister", "take"]\n'
    )
    folder.chmod(0o755)
    limits = {
        "max_names_per_uid": 5,
        "max_descriptors_per_uid": 8,
        "max_connections_per_uid": 4,
        "max_connections": 20,
    }
    with Manager(folder / "s", mode=0o666, policy=folder / "policy", limits=limits) as manager:
        yield manager


def registers(path: str, uid: int, count: int, size: int = 1) -> str:
    def task() -> None:
        fd = os.memfd_create("x")
        with Wire(path, f"{uid}") as wire:
            for index in range(count):
                name = f"{uid}/{size}/{index}"
                wire.ask(index + 1, m.Register(name, KIND, replace=True), [fd] * size)

    return as_user(uid, task)


@needs_root
def test_names_of_a_user(shared: Manager, fd: int) -> None:
    assert registers(shared.address, 1501, 5) == "None"
    assert registers(shared.address, 1501, 6) == "max_names_per_uid 5 5"
    assert registers(shared.address, 1502, 5) == "None"
    for index in range(10):  # root is not bound
        shared.register(f"root/{index}", fd)
    shared.unregister("1501/1/0")
    assert registers(shared.address, 1501, 1) == "None"


@needs_root
def test_descriptors_of_a_user(shared: Manager) -> None:
    assert registers(shared.address, 1501, 3, size=3) == "max_descriptors_per_uid 8 6"
    assert registers(shared.address, 1502, 1, size=8) == "None"
    Halves(shared).kill("server")  # who has what is in the table
    assert registers(shared.address, 1502, 2, size=8) == "max_descriptors_per_uid 8 8"
    assert registers(shared.address, 1502, 1, size=8) == "None"  # a replacement


@needs_root
def test_connections_of_a_user(shared: Manager) -> None:
    """The fifth closes the longest idle of the same user's, and nobody else's."""
    path = shared.address

    def idle(count: int) -> int:
        wires = [Wire(path, f"{index}") for index in range(count)]
        gone = 0
        for wire in wires:
            try:
                wire.ask(1, m.Ping())
            except (EOFError, OSError):
                gone += 1
        return gone

    mine = [Wire(path, f"mine {index}") for index in range(5)]
    assert as_user(1501, lambda: idle(4)) == "0"
    assert as_user(1501, lambda: idle(7)) == "3"
    for wire in mine:  # root's, idle for longer
        wire.ask(1, m.Ping())
        wire.close()


@needs_root
def test_who_waits_is_not_idle(shared: Manager, fd: int) -> None:
    """Requests under way, and entries that live as long as the client, come last."""
    path = shared.address

    ends = []

    def crowd() -> list[bool]:
        waiting, holding = Wire(path, "waits"), Wire(path, "holds")
        waiting.send(1, m.Fetch("late", 60.0))
        near, far = socket.socketpair()
        ends.append(near)
        holding.ask(1, m.Register("held", KIND, lifetime="connection"), [fd, far.fileno()])
        idle = [Wire(path, f"idle {index}") for index in range(6)]
        return [alive(wire, 9) for wire in (waiting, holding, *idle)]

    assert as_user(1501, crowd) == repr([True, True, *[False] * 4, True, True])


def alive(wire: Wire, id: int) -> bool:
    try:
        wire.ask(id, m.Ping())
    except (EOFError, OSError):
        return False
    return True


@needs_root
def test_a_user_cannot_shut_out_another(shared: Manager) -> None:
    """A user's places are all taken by clients that wait."""
    path = shared.address
    said, says = os.pipe()
    proceed, go = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.close(go)
            as_one(1501)
            wires = [Wire(path, f"{index}") for index in range(4)]
            for wire in wires:
                wire.send(1, m.Fetch("late", 60.0))
            os.write(says, b"x")
            os.read(proceed, 1)  # its end
        finally:
            os._exit(0)
    os.read(said, 1)
    # The fifth of the same user's makes the first of the four try again; nobody else is touched.
    assert registers(path, 1501, 1) == "None"
    assert registers(path, 1502, 1) == "None"
    shared.ping()
    assert shared.stats().counters["evicted"] == 1
    for fd in (go, said, says, proceed):
        os.close(fd)
    os.waitpid(pid, 0)


def as_one(uid: int) -> None:
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


# Descriptors that epoll remembers.


def test_no_ghosts(fd: int) -> None:
    """The keeper has a copy of each: a number that was closed and not taken out of the epoll would
    be reported for ever."""
    with Manager() as manager:
        halves = Halves(manager)
        server = halves.pids()["server"]
        for turn in range(50):
            near, far = socket.socketpair()
            manager.register("a", near, drop_on_hangup=True, replace=True)
            if turn % 3 == 0:
                manager.unregister("a")
            elif turn % 3 == 1:
                manager.register("a", fd, replace=True)
            near.close()
            far.close()
        wait_until(lambda: set(manager.names()) <= {"a"})
        if "a" in manager:
            manager.unregister("a")
        halves.check_census()
        watched = polled(server)
        # The listener, its own wake-up, the journal, the keeper, and one client.
        assert len(watched) == 5
        used, since = cpu_seconds(server), time.monotonic()
        wait_until(lambda: time.monotonic() > since + 0.3)
        assert cpu_seconds(server) - used < 0.15


def polled(pid: int) -> list[int]:
    """The numbers in the epoll of *pid*, proc_pid_fdinfo(5)."""
    for number in os.listdir(f"/proc/{pid}/fd"):
        if os.readlink(f"/proc/{pid}/fd/{number}") == "anon_inode:[eventpoll]":
            with open(f"/proc/{pid}/fdinfo/{number}") as file:
                return [int(line.split()[1]) for line in file if line.startswith("tfd:")]
    raise AssertionError("there is no epoll")


# Much.


def test_ten_thousand_names(fd: int) -> None:
    """At its limit it lists, tells, fetches and removes; a watcher gets all of it."""
    with Manager() as manager:
        most = int(manager.stats().limits["max_names"])
        count = min(10_000, most)
        with Wire(manager.address, "many") as wire:
            for start in range(0, count, 100):
                for index in range(start, min(start + 100, count)):
                    request = m.Register(f"n/{index}", KIND, metadata={"m": "x" * 100})
                    wire.send(index + 1, request, [fd])
                for _ in range(start, min(start + 100, count)):
                    assert isinstance(wire.receive().reply, m.Registered)
        assert len(manager.names()) == count
        assert len(manager.infos()) == count
        with manager.watch(timeout=20) as watch:
            next(watch)
            assert len(watch.held) == count
        halves = Halves(manager)
        halves.kill("server")
        assert len(manager.names()) == count
        halves.kill("keeper")
        manager.fetch_raw("n/77")[0].close()
        manager.unregister("n/77")
        assert len(manager.names()) == count - 1


Serve = Callable[..., Manager]


@pytest.mark.parametrize("nofile", [20, 64, 256, 1024, 20_000, 1 << 20])
def test_limits_fit_into_the_process(nofile: int) -> None:
    limits = Limits.for_rlimit(nofile)
    if nofile > 2 * RESERVE:
        assert limits.max_descriptors + limits.max_connections + RESERVE <= nofile
        assert limits.in_flight < nofile / 2
    assert limits.max_names_per_uid <= limits.max_names
    assert limits.in_flight_per_connection <= max(limits.in_flight, 8)
    for number in msgspec.structs.astuple(limits):
        assert number > 0


def test_limits_by_name() -> None:
    limits = Limits.for_rlimit(1024, max_names=7, lease_timeout=0.5)
    assert (limits.max_names, limits.lease_timeout) == (7, 0.5)
    with pytest.raises(InvalidArgument) as caught:
        Limits.for_rlimit(1024, max_nmaes=7)
    assert "max_nmaes" in str(caught.value)


def test_a_limit_that_there_is_not(folder: Path) -> None:
    manager = Manager(folder / "x.sock", keeper=False, limits={"max_fun": 1})
    with pytest.raises(InvalidArgument) as caught:
        manager.start()
    assert "max_fun" in str(caught.value)


def test_max_names(serve: Serve, null: int) -> None:
    with Client(serve(limits={"max_names": 3}).address) as client:
        for name in "abc":
            client.register(name, null)
        for _ in range(2):
            with pytest.raises(QuotaExceeded) as caught:
                client.register("d", null)
            assert caught.value.fields == {"what": "max_names", "limit": 3, "used": 3}
            assert caught.value.errno == errno.EDQUOT
            assert "max_names" in str(caught.value)
        client.register("a", null, replace=True)
        client.rename("a", "e")
        client.unregister("b")
        client.register("d", null)
        with pytest.raises(QuotaExceeded):
            client.bind("f", "tcp://127.0.0.1:0")
        assert client.names() == ["c", "d", "e"]


def test_max_descriptors(serve: Serve, null: int) -> None:
    manager = serve(limits={"max_descriptors": 10})
    with Client(manager.address) as client, Peer(manager.address) as peer:
        peer.ask(m.Register("a", KIND), [null] * 4)
        peer.ask(m.Register("b", KIND), [null] * 5)
        reply = peer.ask(m.Register("c", KIND), [null] * 2)
        assert reply.fields == {"what": "max_descriptors", "limit": 10, "used": 9}
        peer.ask(m.Register("c", KIND), [null])
        assert client.stats().descriptors == 10
        with pytest.raises(QuotaExceeded):
            client.register("d", null)
        assert type(peer.ask(m.Register("a", KIND, replace=True), [null] * 4)) is m.Registered
        assert peer.ask(m.Register("a", KIND, replace=True), [null] * 5).code == "quota_exceeded"
        client.unregister("c")
        with pytest.raises(QuotaExceeded):  # the lifeline, and the pidfd, are descriptors too
            client.register("d", null, lifetime="connection")
        with pytest.raises(QuotaExceeded):
            client.register("d", null, lifetime="process")
        client.register("d", null)
        for descriptor in client.take_raw("b"):  # a full server can be emptied
            descriptor.close()
        client.register("e", null, lifetime="process")


def test_at_the_limit_everything_else_goes_on(serve: Serve, null: int) -> None:
    with Client(serve(limits={"max_names": 2}).address) as client:
        client.register("a", null)
        client.register("b", null)
        assert client.names() == ["a", "b"]
        assert len(client.infos()) == 2
        client.fetch("a").close()
        client.rename("a", "c")
        client.take("c").close()
        client.unregister("b")
        client.ping()
