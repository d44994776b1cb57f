"""The units of a user, as `fdshare systemd-units --user` writes them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import wait_until

from .container import ROOT
from .service import run

UID = 4321
RUNTIME = f"/run/user/{UID}"
ENVIRONMENT = {
    "HOME": "/home/fdshare-user",
    "USER": "fdshare-user",
    "PATH": os.environ["PATH"],
    "PYTHONPATH": str(ROOT),
    "XDG_RUNTIME_DIR": RUNTIME,
    "DBUS_SESSION_BUS_ADDRESS": f"unix:path={RUNTIME}/bus",
}


def as_user(*words: str) -> str:
    """What a command of the user prints."""
    become = ["setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups"]
    done = subprocess.run(
        [*become, *words], env=ENVIRONMENT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, (words, done.stderr)
    return done.stdout


@pytest.fixture
def user() -> Iterator[None]:
    """One whose systemd runs, with the units."""
    run("useradd", "-m", "-u", str(UID), "fdshare-user").check_returncode()
    run("loginctl", "enable-linger", "fdshare-user")
    if run("systemctl", "start", f"user@{UID}.service").returncode:
        pytest.skip("the systemd of a user does not start here (Debian: libpam-systemd, dbus)")
    as_user("fdshare", "systemd-units", "--user")
    as_user("systemctl", "--user", "daemon-reload")
    as_user("systemctl", "--user", "enable", "--now", "fdshare.socket")
    yield
    run("systemctl", "stop", f"user@{UID}.service")
    run("userdel", "-r", "fdshare-user")


def stats() -> dict[str, int]:
    return json.loads(as_user("fdshare", "stats", "--json"))


def names() -> list[str]:
    return [entry["name"] for entry in json.loads(as_user("fdshare", "ls", "--json"))]


def redundant() -> dict[str, int]:
    return wait_until(lambda: (found := stats())["redundant"] and found, "both halves are there")


def kill(*halves: str) -> None:
    pids = [redundant()[f"{half}_pid"] for half in halves]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


@pytest.mark.usefixtures("user")
def test_a_users_server_loses_nothing() -> None:
    as_user("fdshare", "register", "kept", "--memory", "/proc/version")
    limit = redundant()["store"]["limit"]  # type: ignore[index]
    assert limit == 16384
    for halves in (["server"], ["keeper"], ["keeper", "server"]):
        kill(*halves)
        assert names() == ["kept"]
    # The keeper is a child of the user's own systemd.
    parent = Path(f"/proc/{redundant()['keeper_pid']}/status").read_text()
    manager = run("systemctl", "show", "-P", "MainPID", f"user@{UID}.service").stdout.strip()
    assert f"PPid:\t{manager}\n" in parent
    for action in ("restart", "reload"):
        as_user("systemctl", "--user", action, "fdshare.service")
        assert names() == ["kept"]
    as_user("systemctl", "--user", "daemon-reexec")
    kill("keeper", "server")
    assert names() == ["kept"]
    as_user("systemctl", "--user", "stop", "fdshare.socket", "fdshare.service")
    assert not os.path.exists(f"{RUNTIME}/fdshare.sock")
