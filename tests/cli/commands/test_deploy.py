"""deploy: the old version goes on until the new one is ready, whatever happens."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commandline import ROOT, Shell
from ending import is_running

EXAMPLE = ROOT / "examples" / "zero_downtime"
DEPLOYS = int(os.environ.get("FDSHARE_DEPLOYS", "3"))
RATE = [] if "FDSHARE_DEPLOYS" in os.environ else ["--rate", "400"]
SERVER = [sys.executable, str(EXAMPLE / "server.py")]
# Says its pid, and never gets ready.
_NEVER = "import os, select; print('never', os.getpid(), flush=True); select.select([], [], [])"
NEVER = [sys.executable, "-c", _NEVER]


class Site:
    """One program under one name, deployed again and again."""

    def __init__(self, shell: Shell) -> None:
        self.shell = shell
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]
        self.name = f"web=tcp://127.0.0.1:{self.port}"
        self.log = Path(f"{shell.path}.web.log")

    def deploy(self, *words: str, version: int = 0, status: int = 0) -> dict[str, Any]:
        """Runs it; its report, and what it printed as "said"."""
        done = self.shell.run(
            "deploy", "--json", *words, env={"VERSION": str(version)}, cwd=EXAMPLE
        )
        assert done.returncode == status, done
        report: dict[str, Any] = json.loads(done.stdout)
        if report["ok"]:
            self.shell.adopt(report["pid"])
        return {**report, "said": done.stderr}

    def start(self, *words: str, version: int = 0) -> subprocess.Popen[str]:
        """The same in the background."""
        return self.shell.start(
            "deploy",
            "--json",
            *words,
            env={"VERSION": str(version)},
            cwd=EXAMPLE,
            stderr=subprocess.PIPE,
        )

    def ask(self) -> str:
        with socket.create_connection(("127.0.0.1", self.port), timeout=30) as sock:
            sock.sendall(b"GET / HTTP/1.1\r\nHost: t\r\nConnection: close\r\n\r\n")
            with sock.makefile("rb") as answer:
                return answer.read().decode().splitlines()[-1]

    def load(self) -> subprocess.Popen[str]:
        """The load generator, running."""
        url = f"http://127.0.0.1:{self.port}/"
        process = subprocess.Popen(
            [sys.executable, str(EXAMPLE / "load.py"), url, *RATE],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "running\n"
        return process

    def running(self) -> set[int]:
        """The processes that have the socket, without the halves of the server."""
        holders = self.shell.json("who", "web")
        return {holder["pid"] for holder in holders if holder["half"] is None}

    def never_ready(self, process: subprocess.Popen[str], until: Callable[..., Any]) -> int:
        """The pid of NEVER, which *process* has started."""
        found = until(lambda: re.search(r"never (\d+)", self.log.read_text()), "the program starts")
        assert process.poll() is None
        return int(found[1])


def outcome(load: subprocess.Popen[str]) -> dict[str, Any]:
    """What came of all requests."""
    load.send_signal(signal.SIGTERM)
    said, _ = load.communicate(timeout=60)
    return json.loads(said)


@pytest.fixture
def site(shell: Shell) -> Site:
    shell.serve()
    return Site(shell)


@pytest.fixture
def served(site: Site) -> Site:
    """A site whose version 1 serves."""
    site.deploy(site.name, "--", *SERVER, version=1)
    return site


def test_the_next_version_serves_and_the_old_one_stops(site: Site) -> None:
    first = site.deploy(site.name, "--", *SERVER, version=1)
    assert (first["stopped"], site.ask()) == ([], "version 1")
    second = site.deploy("web", "--", *SERVER, version=2)
    assert second["stopped"] == [first["pid"]]
    assert not is_running(first["pid"])
    assert site.ask() == "version 2"
    assert site.running() == {second["pid"]}
    rows = {row["version"]: row for row in site.shell.json("deployments")}
    assert rows["deployed"].items() >= {"pid": second["pid"], "state": "runs", "waiting": 0}.items()
    assert rows["previous"].items() >= {"pid": first["pid"], "state": "ended"}.items()
    head, *lines = site.shell("deployments").splitlines()
    assert head.split()[:4] == ["NAME", "VERSION", "STATE", "PID"]
    assert len(lines) == 2


def test_it_tells_people_what_it_waits_for(site: Site) -> None:
    done = site.shell.run("deploy", site.name, "--", *SERVER)
    pid = int(re.fullmatch(r"web: pid (\d+) serves\n", done.stdout)[1])
    site.shell.adopt(pid)
    assert done.stderr == f"fdshare: pid {pid} is started: waits for READY=1\n"


def test_a_broken_release_is_ended(served: Site) -> None:
    report = served.deploy("web", "--", "sh", "-c", "echo no module; exit 3", status=1)
    assert "ended with status 3 before it was ready; the old version goes on" in report["error"]
    assert "    no module\n" in report["said"]
    assert served.ask() == "version 1"
    assert len(served.running()) == 1


def test_a_release_that_is_ready_and_ends(served: Site) -> None:
    code = "import fdshare; fdshare.notify('READY=1')"
    words = ["--settle", "30", "web", "--", sys.executable, "-c", code]
    report = served.deploy(*words, status=1)
    assert "the old version goes on" in report["error"]
    assert served.ask() == "version 1"


def test_a_wrapper_is_told(served: Site) -> None:
    """A program that ignored its socket could be ready, and nobody would accept."""
    report = served.deploy("web", "--", "timeout", "60", *SERVER, status=1)
    assert "fdshare: timeout starts the program as its child" in report["said"]
    assert served.ask() == "version 1"


def test_a_release_that_never_gets_ready_is_ended(served: Site) -> None:
    report = served.deploy("--ready-timeout", "0.5", "web", "--", *NEVER, status=1)
    assert "was not ready within 0.5 s, and is ended" in report["error"]
    assert served.ask() == "version 1"
    assert len(served.running()) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_deploy_leaves_the_old_version(
    served: Site, until, number: signal.Signals
) -> None:
    process = served.start("web", "--", *NEVER)
    pid = served.never_ready(process, until)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert not is_running(pid)
    assert served.ask() == "version 1"


def test_a_killed_deploy_leaves_the_old_version(served: Site, until) -> None:
    process = served.start("web", "--", *NEVER)
    pid = served.never_ready(process, until)
    process.kill()
    until(lambda: not is_running(pid), "the helper ends the new version")
    # Nothing is left of it: the next one does not wait.
    served.deploy("--no-wait", "web", "--", *SERVER, version=2)
    assert served.ask() == "version 2"


def test_a_deploy_that_is_killed_while_the_old_version_stops(
    served: Site, until, folder: Path
) -> None:
    """Both run then, and the next deploy ends both."""
    old = served.running()
    stubborn = folder / "stubborn.py"
    text = (EXAMPLE / "server.py").read_text().replace("signal.SIGTERM", "signal.SIGUSR2")
    stubborn.write_text(text)
    ignoring = ["env", "--ignore-signal=TERM", sys.executable, str(stubborn)]
    slow = served.deploy("web", "--", *ignoring, version=2)
    assert not any(map(is_running, old))
    process = served.start("web", "--", *SERVER, version=3)
    until(lambda: _deployed(served) != slow["pid"], "version 3 is recorded")
    process.kill()
    process.wait()
    last = served.deploy("--stop-timeout", "0.2", "web", "--", *SERVER, version=4)
    assert slow["pid"] in last["stopped"]
    assert len(last["stopped"]) == 2
    assert "did not stop within 0.2 s: it is killed" in last["said"]
    assert served.running() == {last["pid"]}
    assert served.ask() == "version 4"


def test_deploys_that_are_killed_at_any_moment(site: Site) -> None:
    site.deploy(site.name, "--", *SERVER)
    load = site.load()
    try:
        for number in range(8):
            process = site.start("web", "--", *SERVER, version=number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.1 * number)
            process.kill()
            process.wait()
        last = site.deploy("web", "--", *SERVER, version=99)
        while site.ask() != "version 99":
            pass
    finally:
        found = outcome(load)
    assert (found["refused"], found["failed"]) == (0, {})
    assert site.running() == {last["pid"]}


def _deployed(site: Site) -> int:
    rows = {row["version"]: row for row in site.shell.json("deployments")}
    pid: int = rows["deployed"]["pid"]
    return pid


def test_rollback_starts_what_ran_before(served: Site) -> None:
    """With its folder and its environment, wherever the rollback is called."""
    served.deploy("web", "--", *SERVER, version=2)
    done = served.shell.run("deploy", "--rollback", "web", cwd="/", env={"VERSION": "9"})
    assert done.returncode == 0
    served.shell.adopt(int(done.stdout.split()[2]))
    assert served.ask() == "version 1"
    served.deploy("--rollback", "web", version=9)
    assert served.ask() == "version 2"


def test_rollback_needs_a_version_before(served: Site) -> None:
    shell = served.shell
    assert "no version of web before" in shell.fails("deploy", "--rollback", "web")
    assert "one NAME" in shell.fails("deploy", "--rollback", "web", "--", "true", status=2)
    assert "CMD" in shell.fails("deploy", "web", status=2)


def test_a_second_deploy_waits_or_is_refused(served: Site, until) -> None:
    first = served.start("web", "--", *NEVER)
    served.never_ready(first, until)
    line = served.shell.fails("deploy", "--no-wait", "web", "--", *SERVER)
    assert line == "fdshare: another deploy of web runs"
    second = served.shell.start(
        "deploy", "web", "--", *SERVER, env={"VERSION": "2"}, stderr=subprocess.PIPE
    )
    assert second.stderr is not None
    assert "waits for its end" in second.stderr.readline()
    first.terminate()
    said, _ = second.communicate(timeout=60)
    served.shell.adopt(int(said.split()[2]))
    assert served.ask() == "version 2"


def test_health_is_asked_of_the_new_version_alone(served: Site, folder: Path) -> None:
    """The old one accepts from the same socket, and answers well."""
    sick = (EXAMPLE / "server.py").read_text().replace("send_response(200)", "send_response(503)")
    assert "503" in sick
    (folder / "sick.py").write_text(sick.replace("READY=1", "STATUS=sick"))
    words = ["--ready-timeout", "3", "--health", "/", "web", "--"]
    report = served.deploy(*words, sys.executable, str(folder / "sick.py"), status=1)
    assert "GET /: 503" in report["error"]
    assert served.ask() == "version 1"
    well = (EXAMPLE / "server.py").read_text().replace("READY=1", "STATUS=well")
    (folder / "well.py").write_text(well)
    words[1] = "60"  # the old one accepts most of what is asked
    served.deploy(*words, sys.executable, str(folder / "well.py"), version=2)
    assert served.ask() == "version 2"


def test_a_rollback_knows_when_that_version_was_ready(site: Site, folder: Path) -> None:
    """It waited for READY=1, which this program does not say."""
    well = (EXAMPLE / "server.py").read_text().replace("READY=1", "STATUS=well")
    (folder / "well.py").write_text(well)
    site.deploy("--health", "/", site.name, "--", sys.executable, folder / "well.py", version=1)
    site.deploy("web", "--", *SERVER, version=2)
    report = site.deploy("--rollback", "--check", "false", "--ready-timeout", "1", "web", status=1)
    assert "--check ended with status 1" in report["error"]
    site.deploy("--rollback", "web")
    assert site.ask() == "version 1"


@pytest.mark.parametrize(
    "target", ["https://x/", "http://h:99999/", "http://h:http/", "http://[::1/"]
)
def test_a_target_that_is_none(fdshare: Shell, target: str) -> None:
    line = fdshare.fails("deploy", "--health", target, "web", "--", "true", status=2)
    assert "--health is tcp, /PATH or http://HOST:PORT/PATH" in line


def test_a_check_of_ones_own(served: Site, folder: Path) -> None:
    words = ["--ready-timeout", "1", "--check", "test -e go; exit $?"]
    report = served.deploy(*words, "web", "--", *SERVER, status=1)
    assert "--check ended with status 1" in report["error"]
    words[-1] = 'test -d "/proc/$FDSHARE_DEPLOY_PID"'
    served.deploy(*words, "web", "--", *SERVER, version=2)
    assert served.ask() == "version 2"


def test_a_version_that_no_deploy_knows(site: Site) -> None:
    done = site.shell.run("run", "--notify", "--detach", site.name, "--", *SERVER, cwd=EXAMPLE)
    pid = int(done.stdout)
    site.shell.adopt(pid)
    report = site.deploy("--old", str(pid), "web", "--", *SERVER, version=2)
    assert report["stopped"] == [pid]
    assert site.ask() == "version 2"
    line = site.shell.fails("deploy", "--old", "4194303", "web", "--", *SERVER, status=2)
    assert "no process 4194303" in line


def test_the_path_of_a_unix_socket_stays(site: Site, folder: Path) -> None:
    """asyncio of Python 3.13 removes it when the old version closes its socket."""
    path = folder / "web.sock"
    code = f"""
import os, select, signal, sys, fdshare
signal.signal(signal.SIGTERM, lambda *a: (os.unlink({str(path)!r}), sys.exit()))
fdshare.notify("READY=1")
while True:
    select.select([], [], [])
"""
    words = [f"web=unix://{path}", "--", sys.executable, "-c", code]
    site.deploy(*words)
    site.deploy(*words)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
    assert [name for name in os.listdir(folder) if name.startswith("web.sock")] == ["web.sock"]


def test_a_program_that_does_not_drain_is_not_killed_by_it(served: Site) -> None:
    report = served.deploy("--drain-signal", "USR2", "web", "--", *SERVER, version=2)
    assert "does not handle SIGUSR2: not drained" in report["said"]
    assert report["stopped"]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--health", "nonsense", "web"], "--health is"),
        (["--health", "tcp", "--check", "true", "web"], "one of --health"),
        (["--stop-signal", "NOSUCH", "web"], "not a signal"),
        (["--keep", "--rebind", "web"], "one of --keep"),
    ],
)
def test_what_does_not_go_together(shell: Shell, words: list[str], reason: str) -> None:
    assert reason in shell.fails("deploy", *words, "--", "true", status=2)


# Under load.

PROGRAMS = {
    "http_server": SERVER,
    "gunicorn": ["gunicorn", "--workers", "2", "--log-level", "warning", "app:wsgi"],
    "uvicorn": ["uvicorn", "--fd={web}", "--loop=asyncio", "--log-level=warning", "app:asgi"],
    "hypercorn": ["hypercorn", "--bind=fd://{web}", "--workers=0", "app:asgi"],
    "aiohttp": [sys.executable, str(EXAMPLE / "aiohttp_server.py")],
    "waitress": [sys.executable, str(EXAMPLE / "waitress_server.py")],
    # It cannot be told to accept no more, and closes what it has accepted and not read.
    "granian": [sys.executable, str(Path(__file__).with_name("granian_server.py"))],
}
OPTIONS = {
    "aiohttp": ["--health", "/", "--drain-signal", "USR1"],
    "waitress": ["--health", "/", "--drain-signal", "USR1"],
    "granian": ["--health", "/"],
}


@pytest.mark.timeout(120 + 24 * DEPLOYS)
@pytest.mark.parametrize("kind", PROGRAMS)
def test_deploys_under_load_refuse_nobody_and_fail_nothing(site: Site, until, kind: str) -> None:
    if kind != "http_server" and importlib.util.find_spec(kind) is None:
        pytest.skip(f"{kind} is not installed: pip install 'fdshare[deploy]'")
    command, options = PROGRAMS[kind], OPTIONS.get(kind, [])
    broken = [word.replace("app:", "nosuch:") for word in command]
    if broken == command:
        broken = ["false"]
    site.deploy(*options, site.name, "--", *command)
    load = site.load()
    try:
        for version in range(1, DEPLOYS + 1):
            site.deploy("web", "--", *broken, status=1)
            last = site.deploy(*options, "web", "--", *command, version=version)
            while site.ask() != f"version {version}":
                pass
    finally:
        found = outcome(load)
    print(kind, found)
    assert found["refused"] == 0
    if kind != "granian":
        assert found["failed"] == {}
    assert found["answered"] > 100
    assert {"version 0", f"version {DEPLOYS}"} <= set(found["versions"])
    leader = os.getsid(last["pid"])
    assert {os.getsid(pid) for pid in site.running()} == {leader}
    os.kill(last["pid"], signal.SIGTERM)  # one that is killed may leave its workers
    until(lambda: not site.running(), "its workers end")


@pytest.mark.skipif(importlib.util.find_spec("gunicorn") is None, reason="no gunicorn")
def test_gunicorn_that_is_ready_before_it_is_loaded(site: Site, folder: Path) -> None:
    name = f"web=unix://{folder}/web.sock"
    gunicorn = ["gunicorn", "--log-level", "warning"]
    site.deploy(name, "--", *gunicorn, "app:wsgi")
    report = site.deploy(name, "--", *gunicorn, "nosuch:wsgi", status=1)
    assert "ended with status 3 before it was ready" in report["error"]
    assert "No module named 'nosuch'" in report["said"]


@pytest.mark.parametrize("half", ["server_pid", "keeper_pid"])
def test_a_killed_half_of_the_server_stops_no_deploy(site: Site, half: str) -> None:
    site.deploy(site.name, "--", *SERVER)
    load = site.load()
    try:
        for version in range(1, DEPLOYS + 1):
            process = site.start("web", "--", *SERVER, version=version)
            os.kill(site.shell.json("stats")[half], signal.SIGKILL)
            said, errors = process.communicate(timeout=60)
            assert process.returncode == 0, errors
            site.shell.adopt(json.loads(said)["pid"])
            while site.ask() != f"version {version}":
                pass
    finally:
        found = outcome(load)
    assert (found["refused"], found["failed"]) == (0, {})
    assert len(site.running()) == 1
