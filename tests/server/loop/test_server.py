"""server: what the service has done for it by the kernel, without a loop that runs."""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, SimpleNamespace

import pytest
from conftest import wait_until

from fdshare.errors import AddressInUse, InvalidArgument, PolicyError
from fdshare.kernel.endpoint import listen
from fdshare.protocol import messages as m
from fdshare.server.core.policy import Subject
from fdshare.server.core.ports import Session
from fdshare.server.core.records import Put, Record
from fdshare.server.core.table import Entry, Lease, Table
from fdshare.server.core.users import User
from fdshare.server.loop.closing import Handle
from fdshare.server.loop.loop import Loop
from fdshare.server.loop.server import Server
from fdshare.server.settings import Settings
from server.orders import KIND

STRANGER = Subject(12345, 12345)


@pytest.fixture
def settings(folder: Path) -> Settings:
    (folder / "policy").write_text('[[rule]]\neffect = "allow"\nverbs = ["fetch"]\n')
    return Settings(path=str(folder / "s"), keeper=False, policy=str(folder / "policy"))


@pytest.fixture
def server(settings: Settings) -> Iterator[Server]:
    with listen(settings.path) as listener:
        server = Server(listener.socket, settings)
        yield server
        server.shut_down()


def session(sock: socket.socket | None = None, pid: int | None = None) -> Session:
    user = User(os.geteuid(), True)
    made = Session(Subject(os.geteuid(), os.getegid()), pid or os.getpid(), user)
    made.route = SimpleNamespace(sock=sock)
    return made


def is_open(fd: int) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")


# Leases.


def test_a_lease_is_what_its_taker_does(server: Server) -> None:
    for word, state in ((None, "held"), (b"\1", "confirmed"), (b"", "dropped")):
        ours, theirs = server.lease_pair()
        fd = theirs.fd
        with socket.socket(fileno=os.dup(fd)) as taker:
            server.close([theirs])
            assert not is_open(fd)  # at once: if it never arrived, that ends the lease
            if word:
                taker.send(word)
            elif word is not None:
                taker.close()
            assert server.lease_state(ours) == state
            assert server.lease_state(ours) == state  # looking changes nothing
        server.close([ours])


def test_a_revoked_lease_is_over_for_both(server: Server) -> None:
    """Who confirmed before has it; who confirms afterwards is told that he has not."""
    for confirms, state in ((True, "confirmed"), (False, "dropped")):
        ours, theirs = server.lease_pair()
        with socket.socket(fileno=os.dup(theirs.fd)) as taker:
            server.close([theirs])
            if confirms:
                taker.send(b"\1")
            assert server.lease_state(ours, revoke=True) == state
            with pytest.raises(BrokenPipeError):
                taker.send(b"\1")
        server.close([ours])


def test_the_leases_that_have_moved_are_known(server: Server) -> None:
    """Those that were confirmed or dropped, until they are closed."""
    registrant = m.Registrant(1, 0, 0)
    ours, takers = {}, {}
    for id in (1, 2, 3):
        ours[id], theirs = server.lease_pair()
        takers[id] = socket.socket(fileno=theirs.fd)
        entry = Entry(Put(f"{id}", id, KIND, 0, registrant, 0.0), f"{id}", id, None, (), None)
        entry.lease = Lease(id, ours[id], 0.0, 0)
        server.watch(entry)
    assert server.moved_leases() == []
    takers[1].send(b"\1")
    takers[2].close()
    assert sorted(server.moved_leases()) == [1, 2]
    server.close([ours[1]])
    assert server.moved_leases() == [2]
    server.close([ours[2], ours[3]])
    assert server.moved_leases() == []
    takers[1].close()
    takers[3].close()


# Guards.


def test_only_a_socket_with_a_peer_is_a_lifeline(
    server: Server, pair: tuple[socket.socket, socket.socket], null: int
) -> None:
    server.check_lifeline(Handle(pair[0].fileno()))
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW) as netlink:
        for fd in (null, netlink.fileno()):
            with pytest.raises(InvalidArgument, match="not a stream socket"):
                server.check_lifeline(Handle(fd))
            os.fstat(fd)


def test_the_guard_of_a_process_is_a_pidfd(
    server: Server, pair: tuple[socket.socket, socket.socket]
) -> None:
    """From the connection where the kernel has it there, else of the number."""
    with socket.socket() as other:
        for sock in (pair[0], other):
            guard = server.owner_guard(session(sock))
            with open(f"/proc/self/fdinfo/{guard.fd}") as info:
                assert f"Pid:\t{os.getpid()}\n" in info.read()
            server.close([guard])
        with pytest.raises(InvalidArgument, match="no process"):
            server.owner_guard(session(other, pid=1 << 22))


def test_a_registrant_has_its_command(server: Server) -> None:
    who = server.registrant(session())
    assert (who.pid, who.uid, who.gid) == (os.getpid(), os.geteuid(), os.getegid())
    with open("/proc/self/cmdline") as file:
        assert who.command == file.read().replace("\0", " ").strip()[:80]
    assert server.registrant(session(pid=1 << 22)).command == ""


def test_of_others_the_name_of_the_program_is_known(server: Server) -> None:
    """Their arguments are in their own memory, for which they can make anybody wait."""
    other = session()
    other.trusted = False
    with open("/proc/self/comm") as file:
        assert server.registrant(other).command == file.read().strip()
    other.pid = 1 << 22
    assert server.registrant(other).command == ""


@pytest.mark.skipif(not os.path.exists("/proc/net/tcp"), reason="no /proc/net")
def test_who_has_a_port_is_looked_up_for_the_trusted_alone(server: Server) -> None:
    """The loop looks through all processes, and does nothing else meanwhile."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        request = m.Bind("a", f"tcp://127.0.0.1:{listener.getsockname()[1]}")
        asking = session()
        for asking.trusted, pid in ((True, os.getpid()), (False, None)):
            with pytest.raises(AddressInUse) as caught:
                server.bind(asking, request)
            assert caught.value.pid == pid


# Closing.


def test_what_is_still_to_be_sent_is_closed_later(server: Server) -> None:
    handle = Handle(os.eventfd(0))
    fd = handle.fd
    handle.pins = 1
    server.close([handle])
    assert is_open(fd)
    server.loop.unpin((handle,))
    wait_until(lambda: not is_open(fd))
    server.close([handle])  # which is nothing, the number may be another's


def test_shutting_down_closes_the_table(settings: Settings) -> None:
    table = Table()
    handles = [Handle(os.eventfd(0)) for _ in range(3)]
    put = Put("a", 1, KIND, 3, m.Registrant(1, 0, 0), 0.0)
    table.apply(Record([put]), list(handles))
    fds = [handle.fd for handle in handles]
    with listen(settings.path) as listener:
        server = Server(listener.socket, settings, table=table)
        server.shut_down()
        assert not any(map(is_open, fds))
        os.fstat(listener.fileno())  # which is the caller's


# The policy.


def test_a_bad_policy_changes_nothing(server: Server, settings: Settings, folder: Path) -> None:
    service, before = server.service, settings.policy_text
    assert service.policy.decide("fetch", "x", STRANGER).allowed
    (folder / "policy").write_text("[[rule]]\neffect = 5\n")
    with pytest.raises(PolicyError):
        server.reload_policy()
    assert service.policy.decide("fetch", "x", STRANGER).allowed
    assert settings.policy_text == before
    (folder / "policy").write_text('[[rule]]\neffect = "deny"\nverbs = ["fetch"]\n')
    server.reload_policy()
    assert not service.policy.decide("fetch", "x", STRANGER).allowed
    assert settings.policy_text == (folder / "policy").read_bytes()


def test_a_reload_by_signal_says_in_the_log_how_it_went(
    server: Server, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "fdshare"):
        server.try_to_reload()
        (folder / "policy").unlink()
        server.try_to_reload()
    assert [record.levelname for record in caplog.records] == ["INFO", "ERROR"]
    assert "stays as it was" in caplog.text


# Without a keeper.


def test_a_server_alone_can_be_ended_and_not_upgraded(server: Server) -> None:
    with pytest.raises(InvalidArgument, match="without a keeper"):
        server.command("upgrade", session(), 1)
    assert (server.stats().keeper_pid, server.stats().redundant) == (None, False)
    server.journal(Record([]), [])  # there is nobody to tell
    assert server.command("shutdown", session(), 1)
    assert server.run() is False


def test_metrics_that_cannot_be_served_are_a_note(settings: Settings) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, listen(settings.path) as listener:
        settings.metrics = f"127.0.0.1:{taken.getsockname()[1]}"
        server = Server(listener.socket, settings)
        server.stop()
        assert server.run() is False
        assert "not served at" in server.notes["metrics"]
        server.shut_down()


# The loop's calls.


@pytest.mark.parametrize("where", [Loop.post, Loop._on_wake])
def test_a_signal_handler_posts_a_call_wherever_it_comes(
    server: Server, where: Callable[..., object]
) -> None:
    """At every line of what posts and takes calls: it waits for nothing that the line holds."""
    made: list[str] = []
    interrupted: list[int] = []

    def handle() -> None:
        server.loop.post(lambda: made.append("handler's"))

    def at_line(frame: FrameType, event: str, argument: object) -> object:
        handler = threading.Thread(target=handle, daemon=True)
        handler.start()
        handler.join(10)
        assert not handler.is_alive(), f"it waits at line {frame.f_lineno}"
        interrupted.append(frame.f_lineno)
        return at_line

    def trace(frame: FrameType, event: str, argument: object) -> object:
        return at_line if frame.f_code is where.__code__ else None

    former = sys.gettrace()
    sys.settrace(trace)
    try:
        server.loop.post(lambda: made.append("ours"))
        server.loop._on_wake(0, 0.0)
    finally:
        sys.settrace(former)
    server.loop._on_wake(0, 0.0)
    assert interrupted
    assert sorted(made) == ["handler's"] * len(interrupted) + ["ours"]
