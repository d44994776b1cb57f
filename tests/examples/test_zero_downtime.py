"""A deploy that refuses nobody: the scripts of examples/zero_downtime, under load."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from commandline import ROOT, Shell

from fdshare.activation import NotifySocket

EXAMPLE = ROOT / "examples" / "zero_downtime"
# FDSHARE_DEPLOYS=50 has that many, with requests as fast as they can be made.
DEPLOYS = int(os.environ.get("FDSHARE_DEPLOYS", "3"))
RATE = [] if "FDSHARE_DEPLOYS" in os.environ else ["--rate", "400"]
COMPARED = DEPLOYS if not RATE else 2  # where the outcome is not promised
KINDS = ["gunicorn", "http_server", "uvicorn", "hypercorn"]


@pytest.fixture
def shell(folder: Path) -> Iterator[Shell]:
    shell = Shell(folder)
    shell.environment["PID_FILE"] = str(folder / "pid")
    yield shell
    shell.close()


def need(kind: str) -> None:
    if kind != "http_server" and importlib.util.find_spec(kind) is None:
        pytest.skip(f"{kind} is not installed: pip install 'fdshare[deploy]'")


class Site:
    """One application under one name, deployed again and again."""

    def __init__(self, shell: Shell, kind: str, **env: str) -> None:
        need(kind)
        self.shell = shell
        self.script = EXAMPLE / f"{kind}.sh"
        self.env = {**shell.environment, **env}
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.env["ADDRESS"] = f"tcp://127.0.0.1:{self.port}"

    def deploy(self, version: int) -> int:
        """Runs the script; the pid of the application."""
        # Into a file: the application keeps standard error open, and the end of a pipe never comes.
        with open(self.shell.folder / "log", "ab") as log:
            command = [str(self.script), str(version)]
            done = subprocess.run(command, env=self.env, stdout=log, stderr=log, timeout=60)
        assert done.returncode == 0, (self.shell.folder / "log").read_text()
        pid = int(Path(self.env["PID_FILE"]).read_text())
        self.shell.adopt(pid)
        return pid

    def load(self, **options: Any) -> subprocess.Popen[str]:
        """The load generator, running."""
        process = subprocess.Popen(
            [sys.executable, str(EXAMPLE / "load.py"), f"http://127.0.0.1:{self.port}/", *RATE],
            stdout=subprocess.PIPE,
            text=True,
            **options,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "running\n"
        return process

    def ask(self) -> str:
        with socket.create_connection(("127.0.0.1", self.port), timeout=30) as sock:
            sock.sendall(b"GET / HTTP/1.1\r\nHost: t\r\nConnection: close\r\n\r\n")
            with sock.makefile("rb") as answer:
                return answer.read().decode().splitlines()[-1]


def stop(load: subprocess.Popen[str]) -> dict[str, Any]:
    """What came of all requests."""
    load.send_signal(signal.SIGTERM)
    said, _ = load.communicate(timeout=60)
    return json.loads(said)


@pytest.mark.timeout(120 + 24 * DEPLOYS)
@pytest.mark.parametrize("kind", KINDS)
def test_deploys_refuse_nobody_and_fail_nothing(shell: Shell, kind: str) -> None:
    shell.serve()
    site = Site(shell, kind)
    site.deploy(0)
    load = site.load()
    try:
        for version in range(1, DEPLOYS + 1):
            site.deploy(version)
            while site.ask() != f"version {version}":
                pass
    finally:
        outcome = stop(load)
    assert outcome["refused"] == 0
    assert outcome["failed"] == {}
    assert outcome["answered"] > 100
    assert {"version 0", f"version {DEPLOYS}"} <= set(outcome["versions"])


@pytest.mark.timeout(120 + 24 * DEPLOYS)
@pytest.mark.parametrize("kind", ["uvicorn", "hypercorn"])
def test_without_draining_nobody_is_refused_either(
    shell: Shell, kind: str, record_property: Callable[[str, object], None]
) -> None:
    """A request in ten thousand may fail then, as it does with plain inheritance: counted apart."""
    shell.serve()
    site = Site(shell, kind, DRAIN="no")
    site.deploy(0)
    load = site.load()
    try:
        for version in range(1, COMPARED + 1):
            site.deploy(version)
    finally:
        outcome = stop(load)
    record_property("failed", outcome["failed"])
    print(kind, outcome)
    assert outcome["refused"] == 0
    assert {"version 0", f"version {COMPARED}"} <= set(outcome["versions"])
    assert set(outcome["failed"]) <= {"no answer", "ConnectionResetError", "BrokenPipeError"}


@pytest.mark.timeout(120 + 24 * DEPLOYS)
@pytest.mark.parametrize("kind", ["uvicorn", "hypercorn"])
def test_plain_inheritance_for_comparison(
    shell: Shell, kind: str, record_property: Callable[[str, object], None], folder: Path
) -> None:
    """The same applications, given the socket by their parent, without fdshare."""
    need(kind)
    site = Site(shell, kind)
    with socket.create_server(("127.0.0.1", site.port), backlog=4096) as listener:
        fd = listener.fileno()
        arguments = {
            "uvicorn": ["uvicorn", "--fd", str(fd), "--loop", "asyncio"],
            "hypercorn": ["hypercorn", "--bind", f"fd://{fd}", "--workers", "0"],
        }[kind]

        def start(version: int) -> subprocess.Popen[bytes]:
            with NotifySocket(str(folder / f"notify{version}")) as manager:
                process = subprocess.Popen(
                    [*arguments, "--log-level", "warning", "app:asgi"],
                    cwd=EXAMPLE,
                    env={
                        **site.env,
                        "VERSION": str(version),
                        "NOTIFY_SOCKET": manager.address,
                    },
                    pass_fds=[fd],
                )
                said = manager.receive()
                assert said is not None
                assert said.says("READY=1")
                return process

        old = start(0)
        load = site.load()
        try:
            for version in range(1, COMPARED + 1):
                new = start(version)
                old.terminate()
                old.wait(30)
                old = new
        finally:
            outcome = stop(load)
            old.terminate()
            old.wait(30)
    record_property("failed", outcome["failed"])
    print(kind, outcome)
    assert outcome["refused"] == 0


def test_a_killed_application_keeps_nobody_out(shell: Shell) -> None:
    """kill -9: who connects meanwhile waits in the backlog, and the next start serves him."""
    shell.serve()
    site = Site(shell, "http_server")
    pid = site.deploy(1)
    fd = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    with open(fd, "rb", closefd=True):
        import select

        assert select.select([fd], [], [], 30)[0]
    with socket.create_connection(("127.0.0.1", site.port), timeout=30) as waiting:
        waiting.sendall(b"GET / HTTP/1.0\r\n\r\n")
        Path(site.env["PID_FILE"]).unlink()
        site.deploy(2)
        with waiting.makefile("rb") as answer:
            assert answer.read().endswith(b"version 2\n")


@pytest.mark.parametrize("half", ["server_pid", "keeper_pid"])
def test_a_killed_server_is_not_noticed(shell: Shell, half: str) -> None:
    """kill -9 of either half of the server, in the middle of a deploy under load."""
    shell.serve()
    site = Site(shell, "http_server")
    site.deploy(0)
    load = site.load()
    try:
        for version in range(1, 4):
            os.kill(shell.json("stats")[half], signal.SIGKILL)
            site.deploy(version)
            while site.ask() != f"version {version}":
                pass
    finally:
        outcome = stop(load)
    assert outcome["refused"] == 0
    assert outcome["failed"] == {}


NOBODY = 65534


@pytest.mark.skipif(os.geteuid() != 0, reason="a port below 1024 needs a server that runs as root")
def test_an_unprivileged_application_has_a_privileged_port(shell: Shell, folder: Path) -> None:
    port = next(p for p in range(700, 1024) if _free(p))
    policy = folder / "policy.toml"
    policy.write_text(
        f"""
        [[rule]]
        effect = "allow"
        users = [{NOBODY}]
        verbs = ["bind"]
        addresses = ["tcp://127.0.0.1:{port}"]
        [[rule]]
        effect = "allow"
        users = [{NOBODY}]
        verbs = ["register", "fetch", "info"]
        names = ["web"]
        """
    )
    folder.chmod(0o755)
    shell.serve("--mode", "0666", "--policy", policy)
    refused = as_nobody(shell, "run", f"web=tcp://127.0.0.1:{port + 1}", "--", "true")
    assert refused.returncode == 1
    assert "may not bind" in refused.stderr
    told = "id -u; readlink /proc/self/fd/{web}"
    done = as_nobody(shell, "run", f"web=tcp://127.0.0.1:{port}", "--", "sh", "-c", told)
    assert done.stderr == ""
    uid, link = done.stdout.split()
    assert uid == str(NOBODY)
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    assert [f"socket:[{row[9]}]" for row in rows if row[1] == f"0100007F:{port:04X}"] == [link]


AS_NOBODY = f"""
import os, sys
import fdshare.activation, fdshare.cli.main, fdshare.cli.commands.run, fdshare.kinds
import fdshare.client.blocking.client, fdshare.cli.support.listener
import ipaddress  # what nobody could not import: it may be under /root
os.setgroups([])
os.setgid({NOBODY})
os.setuid({NOBODY})
sys.exit(fdshare.cli.main.run(sys.argv[1:]))
"""


def as_nobody(shell: Shell, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", AS_NOBODY, *words]
    return subprocess.run(
        command, env=shell.environment, capture_output=True, text=True, timeout=60
    )


def _free(port: int) -> bool:
    try:
        with socket.create_server(("127.0.0.1", port)):
            return True
    except OSError:
        return False


def test_the_scripts_are_programs() -> None:
    for kind in KINDS:
        script = EXAMPLE / f"{kind}.sh"
        assert os.access(script, os.X_OK)
        if shutil.which("sh"):
            subprocess.run(["sh", "-n", str(script)], check=True)
