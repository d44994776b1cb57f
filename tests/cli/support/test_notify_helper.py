"""run --notify: a service manager where there is none."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commandline import FDSHARE, Shell

from fdshare.activation import NotifySocket

SERVICE = """
import json, os, sys
import fdshare.activation as a
passed = a.listen_fds()
print(json.dumps({k: [os.fstat(d.fileno()).st_ino for d in v] for k, v in passed.items()}),
      flush=True)
[d.detach() for v in passed.values() for d in v]
"""


@pytest.fixture
def service(fdshare: Shell):
    """Runs a service: SERVICE, then *code*; what it was passed."""

    def run(code: str = "", *options: str) -> dict[str, list[int]]:
        command = [sys.executable, "-c", SERVICE + code]
        said = fdshare("run", "--notify", "web=tcp://127.0.0.1:0", *options, "--", *command)
        return json.loads(said.splitlines()[0])

    return run


def test_what_is_stored_comes_back(fdshare: Shell, service) -> None:
    store = """
kept = [os.memfd_create("one"), os.memfd_create("two")]
print([os.fstat(fd).st_ino for fd in kept])
a.store("state", kept)
a.store("other", [os.memfd_create("three")])
a.barrier(30)
"""
    first = service(store)
    assert list(first) == ["web"]
    names = [entry["name"] for entry in fdshare.json("ls", "web/*")]
    assert names == ["web/other", "web/state", "web/state:2"]
    second = service()
    assert list(second) == ["web", "state", "other"]
    assert second["web"] == first["web"]
    assert len(second["state"]) == 2
    third = service("a.unstore('state'); a.barrier(30)")
    assert third == second
    assert list(service()) == ["web", "other"]


def test_what_is_stored_twice_is_kept_once(fdshare: Shell, service) -> None:
    service("fd = os.memfd_create('x'); a.store('s', [fd]); a.store('s', [fd, fd]); a.barrier(30)")
    assert len(service()["s"]) == 1


def test_a_hang_up_removes_it_unless_told_otherwise(fdshare: Shell, service, until) -> None:
    service(
        """
import socket
one, two = socket.socketpair(), socket.socketpair()
a.store("polled", [one[0]])
a.store("kept", [two[0]], poll=False)
a.barrier(30)
"""
    )
    until(lambda: len(fdshare.json("ls", "web/*")) == 1, "the hang-up is noticed")
    assert list(service()) == ["web", "kept"]


def test_a_name_that_is_none_becomes_stored(fdshare: Shell) -> None:
    code = SERVICE + "a.notify('FDSTORE=1\\nFDNAME=a:b', fds=[os.memfd_create('x')]); a.barrier(30)"
    done = fdshare.run("run", "--notify", "web=tcp://127.0.0.1:0", "--", sys.executable, "-c", code)
    assert "the name is ignored" in done.stderr
    assert [entry["name"] for entry in fdshare.json("ls", "web/*")] == ["web/stored"]


def test_entries_of_others_in_the_group_are_not_passed(fdshare: Shell, service) -> None:
    fdshare("register", "web/http", "--memory", "/dev/null")
    assert list(service()) == ["web"]


def test_the_socket_is_gone_with_the_program(fdshare: Shell, service, until) -> None:
    code = "import os; print(os.environ['NOTIFY_SOCKET'], flush=True)"
    command = [sys.executable, "-c", code]
    path = Path(fdshare("run", "--notify", "web=tcp://127.0.0.1:0", "--", *command).strip())
    until(lambda: not path.parent.exists(), "the folder of the socket is removed")


READY = """
import os, select, fdshare
fdshare.notify("READY=1")
select.select([], [], [])
"""


def test_detach_returns_when_the_program_is_ready(fdshare: Shell) -> None:
    command = ["--", sys.executable, "-c", READY]
    # Its standard error is ours for as long as it runs; its standard output is not.
    process = fdshare.start("run", "--notify", "--detach", "web=tcp://127.0.0.1:0", *command)
    assert process.stdout is not None
    pid = int(process.stdout.read())
    fdshare.adopt(pid)
    assert process.wait(30) == 0
    assert b"READY=1" in Path(f"/proc/{pid}/cmdline").read_bytes()
    assert os.readlink(f"/proc/{pid}/fd/0") == "/dev/null"


def test_detach_tells_of_a_program_that_ended(fdshare: Shell) -> None:
    words = ["run", "--notify", "--detach", "web=tcp://127.0.0.1:0", "--"]
    line = fdshare.fails(*words, "sh", "-c", "exit 3")
    assert line == "fdshare: the program ended with status 3 before it was ready"


def test_detach_ends_a_program_that_is_never_ready(fdshare: Shell) -> None:
    words = ["run", "--notify", "--detach", "--ready-timeout", "0.2", "web=tcp://127.0.0.1:0", "--"]
    line = fdshare.fails(*words, sys.executable, "-c", READY.replace("READY=1", "STATUS=slow"))
    assert line == "fdshare: the program was not ready within 0.2 s, and is ended"


def test_ready_fd(fdshare: Shell) -> None:
    reads, writes = os.pipe()
    with open(reads, "rb") as ready:
        process = fdshare.start(
            "run",
            "--notify",
            "--ready-fd",
            str(writes),
            "web=tcp://127.0.0.1:0",
            "--",
            sys.executable,
            "-c",
            READY,
            pass_fds=[writes],
        )
        os.close(writes)
        # To the end: neither the program nor the helper keeps it open.
        assert ready.read() == b"\n"
    assert process.poll() is None


def test_it_passes_on_to_a_manager_above(fdshare: Shell, folder: Path) -> None:
    with NotifySocket(str(folder / "above")) as manager:
        env = {"NOTIFY_SOCKET": manager.address}
        code = (
            SERVICE
            + "a.notify(f'READY=1\\nSTATUS={os.getpid()}\\nX=y'); a.store('s', [0]); a.barrier(30)"
        )
        fdshare(
            "run", "--notify", "web=tcp://127.0.0.1:0", "--", sys.executable, "-c", code, env=env
        )
        said = manager.receive()
        assert said is not None
        assert said.sender is not None
        ready, status = said.lines
        assert ready == "READY=1"
        if os.geteuid() == 0:  # who may report as another process
            assert status == f"STATUS={said.sender.pid}"


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="setpriv is not installed")
def test_it_says_what_a_unit_needs_where_it_cannot_report_as_the_program(
    fdshare: Shell, folder: Path
) -> None:
    drop = ["setpriv", "--bounding-set=-sys_admin"] if os.geteuid() == 0 else []
    words = ["run", "--notify", "web=tcp://127.0.0.1:0", "--", sys.executable, "-c"]
    code = SERVICE + "a.notify('READY=1'); a.barrier(30)"
    with NotifySocket(str(folder / "above")) as manager:
        done = subprocess.run(
            [*drop, *FDSHARE, *words, code],
            env={**fdshare.environment, "NOTIFY_SOCKET": manager.address},
            capture_output=True,
            text=True,
        )
        (line,) = done.stderr.splitlines()
        assert "NotifyAccess=all" in line
        said = manager.receive()
        assert said is not None
        assert said.lines == ["READY=1"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_another_user_is_not_heard(fdshare: Shell) -> None:
    code = """
import os, socket
s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
os.chmod(os.path.dirname(os.environ["NOTIFY_SOCKET"]), 0o777)
os.chmod(os.environ["NOTIFY_SOCKET"], 0o777)
import fdshare.activation as a, fdshare.kernel.ancillary
pid = os.fork()
if pid == 0:
    os.setuid(65534)
    a.notify("FDSTORE=1", fds=[0])
    os._exit(0)
os.waitpid(pid, 0)
a.barrier(30)
"""
    done = fdshare.run("run", "--notify", "web=tcp://127.0.0.1:0", "--", sys.executable, "-c", code)
    assert "of uid 65534 is ignored" in done.stderr
    assert fdshare.json("ls", "web/*") == []


def test_notify_needs_a_name(fdshare: Shell) -> None:
    assert "give one" in fdshare.fails("run", "--notify", "--", "true", status=2)


def test_a_closed_ready_fd(fdshare: Shell) -> None:
    words = ["run", "--notify", "--ready-fd", "77", "web=tcp://127.0.0.1:0", "--", "true"]
    assert "descriptor 77 is not open" in fdshare.fails(*words, status=2)
