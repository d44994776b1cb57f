"""run --notify: a service manager where there is none."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commandline import FDSHARE, Shell

from cli.support.conftest import SERVICE
from fdshare.activation import NotifySocket
from fdshare.cli.support.notify_helper import notify_socket


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


BECOME = """
import os, sys
import fdshare.activation as a
pid = os.fork()
if pid == 0:
    if sys.argv[1:] == ["stranger"]:
        os.setsid()
        if os.fork():
            os._exit(0)
        while os.getppid() == os.getsid(0):
            pass
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    a.notify("FDSTORE=1\\nFDNAME=s", fds=[0], timeout=30)
    a.barrier(30)
    os._exit(0)
os.waitpid(pid, 0)
sys.stdin.read()
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_a_program_that_becomes_another_user_is_heard(fdshare: Shell) -> None:
    command = ["run", "--notify", "web=tcp://127.0.0.1:0", "--", sys.executable, "-c", BECOME]
    fdshare(*command)
    assert [entry["name"] for entry in fdshare.json("ls", "web/*")] == ["web/s"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_another_user_is_not_heard(fdshare: Shell) -> None:
    """One that is not of the program: everybody can reach the socket."""
    command = ["run", "--notify", "web=tcp://127.0.0.1:0", "--", sys.executable, "-c", BECOME]
    process = fdshare.start(
        *command, "stranger", stdin=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
    )
    assert process.stderr is not None
    assert "of uid 65534 is ignored" in process.stderr.readline()
    process.communicate(timeout=60)
    assert fdshare.json("ls", "web/*") == []


def test_every_program_can_reach_the_socket_whatever_tmpdir_is(
    fdshare: Shell, folder: Path
) -> None:
    long = folder / ("d" * 60) / ("e" * 60)
    long.mkdir(parents=True)
    code = SERVICE + "import os; print(os.environ['NOTIFY_SOCKET']); a.barrier(30)"
    for place in (long, folder / "nothing"):
        words = ["run", "--notify", "web=tcp://127.0.0.1:0", "--", sys.executable, "-c", code]
        said = fdshare(*words, env={"TMPDIR": str(place)})
        assert len(said.splitlines()[-1]) < 100
    assert list(long.iterdir()) == []


def test_the_folder_of_one_that_was_killed_is_removed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fdshare.cli.support.notify_helper._folders", lambda: [str(folder)])
    with notify_socket() as kept, notify_socket() as killed:
        other = Path(killed.address).parent
        killed.abandon()  # closed, and its path stays
        with notify_socket() as new:
            places = [Path(sock.address).parent for sock in (kept, new)]
            assert sorted(folder.iterdir()) == sorted(places)
            assert other not in places


READ_ONLY = """
for place in /run /tmp /var/tmp; do
    mount --bind $place $place && mount -o remount,bind,ro $place || exit 77
done
cd /
exec "$@"
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
@pytest.mark.skipif(shutil.which("unshare") is None, reason="unshare is not installed")
def test_where_no_folder_can_be_written_the_socket_is_abstract(fdshare: Shell) -> None:
    code = SERVICE + "import os; print(os.environ['NOTIFY_SOCKET']); a.barrier(30)"
    words = ["run", "--notify", "web=tcp://127.0.0.1:0", "--", sys.executable, "-c", code]
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", READ_ONLY, "sh", *FDSHARE, *words],
        env={**fdshare.environment, "TMPDIR": "/tmp"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    if done.returncode == 77 or "unshare failed" in done.stderr:
        pytest.skip("no mount namespace here")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("@fdshare-notify-")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_a_policy_without_list_starts_it(shell: Shell, folder: Path) -> None:
    policy = folder / "policy.toml"
    policy.write_text(
        """
        [[rule]]
        effect = "allow"
        users = [65534]
        verbs = ["register", "fetch"]
        names = ["web"]
        [[rule]]
        effect = "allow"
        users = [65534]
        verbs = ["bind"]
        addresses = ["tcp://127.0.0.1:0"]
        """
    )
    folder.chmod(0o755)
    shell.serve("--mode", "0666", "--policy", policy)
    words = ["run", "--notify", "web=tcp://127.0.0.1:0", "--", "true"]
    code = (
        "import os, sys, fdshare.cli.main as m, fdshare.cli.commands.run\n"
        "import fdshare.cli.support.notify_helper, fdshare.cli.support.listener\n"
        "import fdshare.kinds, fdshare.kernel.shared_memory\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534); sys.exit(m.run(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        env=shell.environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        "fdshare: web gets nothing of what it may have stored: uid 65534 may not"
    )


def test_notify_needs_a_name(fdshare: Shell) -> None:
    assert "give one" in fdshare.fails("run", "--notify", "--", "true", status=2)


def test_a_closed_ready_fd(fdshare: Shell) -> None:
    words = ["run", "--notify", "--ready-fd", "77", "web=tcp://127.0.0.1:0", "--", "true"]
    assert "descriptor 77 is not open" in fdshare.fails(*words, status=2)
