"""What a service manager passes to a server, and what a former server left with it."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from commandline import Shell
from service_manager import Manager

from fdshare.kernel.descriptor import Descriptor
from fdshare.server.failover.labels import PAGE, TABLE

Until = Callable[..., Any]


@pytest.fixture
def manager(folder: Path) -> Iterator[Manager]:
    manager = Manager(folder)
    yield manager
    manager.close()


def test_it_needs_a_service_manager_and_a_keeper(folder: Path) -> None:
    shell = Shell(folder)
    assert "NOTIFY_SOCKET is not set" in shell.fails("serve", "--fdstore", status=2)
    assert not os.path.exists(shell.path)
    assert "--keeper" in shell.fails("serve", "--fdstore", "--no-keeper", status=2)


def test_a_table_takes_a_keeper(manager: Manager) -> None:
    manager.start()
    manager.shell("register", "one", "--memory", "/dev/null")
    manager.kill_all()
    before = manager.names()
    assert manager.launch("--no-keeper").wait(30) == 2
    assert manager.names() == before


def test_labels_without_a_table_are_let_go(manager: Manager, until: Until) -> None:
    shell = manager.shell
    manager.start()
    shell("register", "one", "--memory", "/dev/null")
    (label,) = set(manager.names()) - {PAGE, TABLE}
    manager.kill_all()
    with manager.lock:
        manager.store.remove(TABLE)
    manager.start()
    assert shell.json("ls") == []
    until(lambda: manager.names() == [PAGE, TABLE], "nothing but another table")
    shell("register", "two", "--memory", "/dev/null")
    assert label not in manager.names()


def test_a_table_of_other_code_stays(manager: Manager) -> None:
    shell = manager.shell
    manager.start()
    shell("register", "one", "--memory", "/dev/null")
    manager.kill_all()
    before = manager.names()
    with manager.lock:
        memfd = dict(manager.store.held)[TABLE].fileno()
        os.pwrite(memfd, (99).to_bytes(8, sys.byteorder), 8)
    manager.start()
    assert "version 99" in shell.json("stats")["notes"]["closed"]
    for words in (["ls"], ["register", "two", "--memory", "/dev/null"], ["upgrade"]):
        assert "it has version 99" in shell.fails(*words)
    manager.kill_all()
    assert manager.names() == before
    os.pwrite(memfd, (1).to_bytes(8, sys.byteorder), 8)
    manager.start()
    assert [entry["name"] for entry in shell.json("ls")] == ["one"]


def test_a_server_has_one_socket(shell: Shell) -> None:
    """As of a socket unit with two ListenStream=."""
    first, second = shell.folder / "first", shell.folder / "second"
    code = """
import os, socket, sys
for path in sys.argv[1:3]:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(path)
    sock.listen()
    os.set_inheritable(sock.detach(), True)  # 3, and then 4
os.environ.update(LISTEN_FDS="2", LISTEN_FDNAMES="a:b", LISTEN_PID=str(os.getpid()))
os.execv(sys.executable, [sys.executable, "-m", "fdshare", "serve", "--ready-fd", sys.argv[3]])
"""
    ready, writes = map(Descriptor, os.pipe())
    with ready, writes, tempfile.TemporaryFile("w+") as said:
        moved = Descriptor(fcntl.fcntl(writes, fcntl.F_DUPFD_CLOEXEC, 10))  # above the sockets
        with moved:
            words = [sys.executable, "-c", code, first, second, moved.fileno()]
            process = subprocess.Popen(
                [*map(str, words)],
                env=shell.environment,
                pass_fds=[moved.fileno()],
                stderr=said,
            )
        writes.close()
        assert os.read(ready.fileno(), 1) == b"\n"
        said.seek(0)
        assert f"{second} is not served" in said.read()
        shell("ping", "--path", first)
        process.terminate()
        process.wait()


def test_what_is_for_another_socket_is_told(shell: Shell) -> None:
    """Options for the socket that a server makes, where one was passed to it."""
    code = """
import os, socket, sys
sock = socket.socket(socket.AF_UNIX)
sock.bind(sys.argv[1])
sock.listen()
os.set_inheritable(sock.detach(), True)
os.environ.update(LISTEN_FDS="1", LISTEN_PID=str(os.getpid()))
os.execv(sys.executable, [sys.executable, "-m", "fdshare", "serve", *sys.argv[2:]])
"""
    said = subprocess.run(
        [sys.executable, "-c", code, shell.path, "/elsewhere", "--mode", "0666",
         "--policy", "/nowhere"],
        env=shell.environment,
        capture_output=True,
        text=True,
    )  # fmt: skip
    first, second = said.stderr.splitlines()
    assert first.endswith(
        f"/elsewhere, --mode: not for {shell.path}, which was passed by LISTEN_FDS"
    )
    assert "/nowhere" in second
