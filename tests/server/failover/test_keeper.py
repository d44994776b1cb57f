"""keeper: either half is killed, and nothing that was acknowledged is lost."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest
from breaking import (
    Half,
    Halves,
    Wire,
    ended,
    kill,
    state,
)
from conftest import wait_until
from mp.common import descriptor_limit_reached
from nursery import Manager

from fdshare.client.blocking.client import Client
from fdshare.errors import (
    KeeperUnavailable,
)
from fdshare.kernel.ancillary import send_message
from fdshare.kernel.descriptor import Descriptor
from fdshare.kernel.endpoint import listen
from fdshare.protocol import messages as m
from fdshare.server.core.records import Move, Put, Record
from fdshare.server.core.table import Table
from fdshare.server.failover.holdings import Holdings
from fdshare.server.failover.journal import Note, decode_letter, encode_letter
from fdshare.server.failover.keeper import Keeper
from fdshare.server.failover.processes import SIGNALS
from fdshare.server.loop.poller import READ
from fdshare.server.settings import Settings
from server.full import limited
from server.orders import KIND, SOME, deaths


def watched(pid: int) -> set[int]:
    """The processes of which *pid* has a pidfd; -1 for one that has been reaped."""
    found = set()
    for number in os.listdir(f"/proc/{pid}/fdinfo"):
        with suppress(FileNotFoundError):
            lines = Path(f"/proc/{pid}/fdinfo/{number}").read_text().splitlines()
            found.update(int(line.split()[1]) for line in lines if line.startswith("Pid:"))
    return found


@pytest.mark.parametrize("half", ["server", "keeper"])
def test_it_ends_although_a_half_is_stopped(half: Half) -> None:
    with Manager() as manager:
        pids = Halves(manager).pids()
        os.kill(pids[half], signal.SIGSTOP)
        manager.shutdown()
    for pid in pids.values():
        wait_until(lambda pid=pid: ended(pid), f"{pid} ends")
    assert not os.path.exists(manager.address)


@pytest.mark.parametrize("half", ["server", "keeper"])
def test_a_half_is_replaced_by_one_that_has_no_descriptor_free(
    manager: Manager, halves: Halves, half: Half
) -> None:
    """Then, and not before: but the other one keeps what both held."""
    manager.register("a", 0)
    halves.redundant()
    pids = halves.pids()
    survivor = pids["keeper" if half == "server" else "server"]
    with limited(survivor, 0):
        kill(pids[half])
        gone = {pids[half], -1}
        wait_until(lambda: ended(survivor) or not gone & watched(survivor), "it is seen")
    assert manager.names() == ["a"]
    halves.redundant()
    manager.unregister("a")


@pytest.mark.parametrize("history", [[], ["keeper"], ["server"]], ids="-".join)
def test_a_server_that_hangs_is_replaced(history: list[Half]) -> None:
    with Manager(limits={"hang_timeout": 1}) as manager:
        halves = Halves(manager)
        read, write = os.pipe()
        manager.register("a", read)
        for half in history:
            halves.kill(half)
        halves.redundant()
        pids = halves.pids()
        os.kill(pids["server"], signal.SIGSTOP)
        assert manager.names() == ["a"]
        assert halves.pids()["keeper"] == pids["keeper"]
        assert halves.pids()["server"] != pids["server"]
        os.close(read)
        os.close(write)


def test_a_shutdown_outlives_a_keeper_that_did_not_hear_of_it() -> None:
    with Manager() as manager:
        pids = Halves(manager).pids()
        os.kill(pids["keeper"], signal.SIGSTOP)
        with Client(manager.address) as client:
            client.shutdown()
        kill(pids["keeper"])
        wait_until(lambda: ended(pids["server"]), "the server ends")
        wait_until(lambda: not os.path.exists(manager.address), "so does the new keeper")


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
    for half in ("server", "keeper", "server"):
        for pid in halves.pids().values():
            os.kill(pid, signal.SIGINT)
        halves.kill(half)
    pids = halves.pids()
    for pid in pids.values():
        os.kill(pid, signal.SIGINT)
    halves.redundant()
    assert halves.pids() == pids


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


@pytest.mark.parametrize("half", ["server", "keeper"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_half_dies_of_something_else_at_a_signal_for_both(
    served: Callable[..., subprocess.Popen[bytes]], folder: Path, half: Half, number: int
) -> None:
    """Its successor would have heard of nothing."""
    process = served("--log-level", "warning")
    with Client(folder / "s") as client:
        Halves(client).redundant()
        pids = Halves(client).pids()
    os.kill(pids[half], signal.SIGSTOP)
    for pid in pids.values():
        os.kill(pid, number)
    kill(pids[half])
    for pid in pids.values():
        wait_until(lambda pid=pid: ended(pid), f"{pid} ends")
    assert not (folder / "s").exists()
    process.wait()


@pytest.mark.parametrize("drained", [False, True], ids=["before the server drains", "afterwards"])
def test_the_keeper_dies_before_it_has_replaced_the_server(
    manager: Manager, halves: Halves, drained: bool
) -> None:
    """At a socket that is bound anew, as here, or by new code. Nobody else has the table."""
    read, write = os.pipe()
    manager.register("a", read)
    pids = halves.pids()
    with Wire(manager.address, "waits") as wire:
        wire.ask(1, m.Ping())
        os.kill(pids["server"], signal.SIGSTOP)
        os.unlink(manager.address)
        os.kill(pids["keeper"], signal.SIGHUP)
        wait_until(lambda: os.path.exists(manager.address), "the path is bound anew")
        wait_until(lambda: state(pids["keeper"]) == "S", "it has told the server")
        if drained:
            os.kill(pids["keeper"], signal.SIGSTOP)
            os.kill(pids["server"], signal.SIGCONT)
            with pytest.raises((EOFError, ConnectionResetError)):
                wire.receive()
    kill(pids["keeper"])
    os.kill(pids["server"], signal.SIGCONT)
    assert manager.names() == ["a"]
    halves.redundant()
    assert pids["server"] != halves.pids()["server"]
    os.close(read)
    os.close(write)


@pytest.mark.parametrize("options", [(), ("--no-keeper",)], ids=["keeper", "no keeper"])
def test_the_main_thread_alone_gets_signals(
    served: Callable[..., subprocess.Popen[bytes]], folder: Path, options: tuple[str, ...]
) -> None:
    """What another thread got while new code is about to be run would be lost."""
    process = served("--log-level", "warning", *options)
    with Client(folder / "s") as client:
        client.register("a", 0)
        client.unregister("a")  # which a thread closes, in each half
        tasks = f"/proc/{process.pid}/task"
        threads = wait_until(lambda: [t for t in os.listdir(tasks) if t != str(process.pid)])
        for thread in threads:
            with open(f"{tasks}/{thread}/status") as file:
                (mask,) = (int(line.split()[1], 16) for line in file if line.startswith("SigBlk"))
            assert all(mask >> number - 1 & 1 for number in SIGNALS)
        wait_until(lambda: state(process.pid) == "S", "the main thread waits")
        os.kill(process.pid, signal.SIGTERM)
        wait_until(lambda: ended(process.pid))
    process.wait()
    assert not (folder / "s").exists()


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


def test_a_keeper_that_loses_a_letter_of_a_dead_server_goes_on(
    lone: tuple[Keeper, socket.socket],
) -> None:
    """It may read the last letters before it hears of the death: nobody else has the table."""
    keeper, journal = lone
    assert keeper._server is not None
    send_message(journal, (b"x",), [0])
    signal.pidfd_send_signal(keeper._server.fileno(), signal.SIGKILL)
    with descriptor_limit_reached():
        assert keeper._read_letter()


def test_a_keeper_that_fails_leaves_the_path(
    lone: tuple[Keeper, socket.socket], folder: Path
) -> None:
    """The server lives, and makes another keeper: clients must still find it."""
    keeper, journal = lone
    inode = keeper._holdings.listener.inode
    assert inode is not None
    keeper._poller.unregister(keeper._journal.fileno())  # `run` watches it itself
    keeper._poller.unregister(keeper._server.fileno())
    journal.send(b"what no code writes")
    with pytest.raises(msgspec.MsgspecError):
        keeper.run()
    keeper._holdings.listener.close()
    info = os.stat(folder / "s")
    assert (info.st_dev, info.st_ino) == inode


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


def notes(journal: socket.socket, *, greeted: bool = False) -> list[Note]:
    """Those that the keeper has sent by now, without its hello unless that was read before."""
    got = []
    with suppress(BlockingIOError):
        while True:
            note = decode_letter(journal.recv(1 << 17, socket.MSG_DONTWAIT))
            assert isinstance(note, Note)
            got.append(note)
    assert greeted or got.pop(0).verb == "hello"
    return got


@pytest.mark.parametrize("tried", [False, True], ids=["trial", "exec"])
def test_a_table_that_cannot_be_handed_over_fails_the_upgrade(
    lone: tuple[Keeper, socket.socket], tried: bool
) -> None:
    """And does not end the keeper: the next one could do no better."""
    keeper, journal = lone
    keeper._holdings.epoch = "\udcff"  # as what no check has foreseen
    if tried:
        keeper._exec()
        before, failed, after = notes(journal)
        assert (before.verb, after.verb) == ("upgrading", "hello")
    else:
        keeper._start_upgrade(Note("upgrade"))
        (failed,) = notes(journal)
    assert failed.verb == "failed"
    assert failed.data is not None
    assert b"surrogates not allowed" in failed.data
    assert keeper._trial is None


def test_why_an_upgrade_failed_need_not_be_utf8(lone: tuple[Keeper, socket.socket]) -> None:
    keeper, journal = lone
    keeper._upgrade_failed(FileNotFoundError(2, "No such file", "/a\udce9/python"))
    keeper._upgrade_failed(MemoryError())
    said = [note.data for note in notes(journal)]
    assert said == [rb"[Errno 2] No such file: '/a\udce9/python'", b"MemoryError"]


def test_a_signal_is_obeyed_before_new_code_is_run(lone: tuple[Keeper, socket.socket]) -> None:
    """Which would not hear of it. A SIGHUP does not cancel the upgrade."""
    keeper, journal = lone
    keeper._holdings.epoch = "\udcff"  # so that no exec succeeds
    keeper._poller.register(keeper._wake.fileno(), READ, keeper._on_signal)
    keeper._ready_to_exec = True
    keeper._note_signal(signal.SIGUSR2, None)  # which the upgrade answers that is under way
    keeper._note_signal(signal.SIGHUP, None)
    keeper._exec()
    assert notes(journal) == []
    assert keeper._ready_to_exec
    keeper._turn()
    assert [note.verb for note in notes(journal, greeted=True)] == [
        "reload",
        "upgrading",
        "failed",
        "hello",
    ]
    keeper._ready_to_exec = True
    keeper._note_signal(signal.SIGTERM, None)
    keeper._exec()
    keeper._turn()
    assert [note.verb for note in notes(journal, greeted=True)] == ["end"]
    assert not keeper._ready_to_exec


def test_new_code_is_told_of_a_reload_that_the_server_has_not_confirmed(
    lone: tuple[Keeper, socket.socket],
) -> None:
    keeper, _ = lone
    assert not keeper._handover(Note("upgrade")).reloading
    keeper._reload()
    assert keeper._handover(Note("upgrade")).reloading
