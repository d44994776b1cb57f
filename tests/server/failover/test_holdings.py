"""holdings: what each half hands to the next, the answers to repeated requests among it."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from breaking import (
    Half,
    Halves,
    Wire,
    identity,
    kill,
)
from conftest import wait_until
from nursery import Manager

from fdshare.errors import (
    NameTaken,
)
from fdshare.kernel.credentials import peer_credentials
from fdshare.kernel.descriptor import Descriptor
from fdshare.kernel.endpoint import Listener, connect, listen
from fdshare.protocol import messages as m
from fdshare.server.core.records import Put, Record
from fdshare.server.core.table import Table
from fdshare.server.failover.holdings import Holdings, bind_anew
from fdshare.server.loop.closing import Handle
from fdshare.server.settings import Settings
from server.full import limited
from server.orders import KIND

STRANGER = 65534


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


def test_answers_of_those_who_do_not_come_back_are_forgotten() -> None:
    """They were connected to a server that died, and have the session timeout to reconnect."""
    with Manager(limits={"session_timeout": 0.2}) as manager:
        wire = Wire(manager.address, "me")
        wire.ask(7, m.Register("a", KIND), [0])
        halves = Halves(manager)
        server = halves.pids()["server"]
        os.kill(server, signal.SIGSTOP)
        wire.close()
        kill(server)
        # Registered with the successor, and longer than what it waits for.
        manager.register("marker", 0, ttl=0.3)
        wait_until(lambda: "marker" not in manager)
        with Wire(manager.address, "me") as wire:
            assert isinstance(wire.refused(7, m.Register("a", KIND), [0]), NameTaken)


# What is held, by itself.


@pytest.fixture
def holdings(folder: Path) -> Iterator[Holdings]:
    """Those of a server with one entry of two descriptors and a guard."""
    made = Holdings(Settings(path=str(folder / "s")), listen(folder / "s"), Table(), "epoch")
    put = Put("a", 1, KIND, 2, m.Registrant(1, 0, 0), 0.0, guarded=True)
    made.table.apply(Record([put]), [Handle(os.eventfd(n)) for n in range(3)])
    yield made
    made.listener.close()
    for handle in made.table.handles():
        os.close(handle.fd)


def test_every_number_that_a_new_half_keeps(holdings: Holdings) -> None:
    listener = holdings.listener
    held = {handle.fd for handle in holdings.table.handles()}
    assert len(held) == 3
    expected = held | {listener.fileno(), listener.lock_fileno()}
    assert holdings.descriptors() == expected
    near, far = socket.socketpair()
    with near, far, Descriptor(os.memfd_create("table")) as memfd:
        holdings.control, holdings.fdstore = near, memfd
        assert holdings.descriptors() == expected | {near.fileno(), memfd.fileno()}


def test_nothing_of_the_other_half_sticks_to_the_handles(holdings: Holdings) -> None:
    for handle in holdings.table.handles():
        handle.key, handle.pins, handle.closing = object(), 3, True
    holdings.forget_other_half()
    for handle in holdings.table.handles():
        assert (handle.key, handle.pins, handle.closing) == (None, 0, False)


def test_who_takes_the_listener_is_seen_to_listen_and_removes_the_path(holdings: Holdings) -> None:
    path = holdings.listener.address
    pid = os.fork()
    if not pid:
        try:
            holdings.take_listener()
            with connect(path) as sock:
                assert peer_credentials(sock).pid == os.getpid()
            holdings.listener.close()
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert not os.path.exists(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes another user")
def test_the_listener_of_another_user_stays_his(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(os.fspath(folder / "sock"))
        pid = os.fork()
        if not pid:
            os.setresuid(STRANGER, STRANGER, STRANGER)
            sock.listen()
            os._exit(0)
        os.waitpid(pid, 0)
        made = Holdings(Settings(path=""), Listener.adopt(sock), Table(), "epoch")
        made.take_listener()
        with made.listener:
            who = peer_credentials(made.listener.socket)
            assert (who.pid, who.uid) == (pid, STRANGER)


@pytest.mark.parametrize("spare", [0, 1, 2])
def test_a_path_is_bound_anew_when_there_are_descriptors_for_it(
    holdings: Holdings, caplog: pytest.LogCaptureFixture, spare: int
) -> None:
    listener, settings = holdings.listener, holdings.settings
    os.unlink(listener.address)
    os.unlink(f"{listener.address}.lock")  # it takes a socket, a lock, and a look at the file
    with limited(os.getpid(), spare):
        assert not bind_anew(listener, settings)
    assert "RLIMIT_NOFILE of the server is" in caplog.text
    assert bind_anew(listener, settings)
    with connect(listener.address) as sock:
        assert peer_credentials(sock).pid == os.getpid()
