"""What the server knows of versions."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from commandline import ROOT, Shell

from fdshare import Client, connect
from fdshare.cli.support.deployment import ProgramStart, Version, deploying, now
from fdshare.kernel.descriptor import Descriptor


@pytest.fixture
def client(fdshare: Shell) -> Iterator[Client]:
    with connect(fdshare.path) as client:
        yield client


def test_a_version_is_what_was_written(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ODD", "\udcff")  # not UTF-8
    start = ProgramStart.here(["web"], ["prog", "\udcfe" * 5000], {"settle": 0.5})
    assert start.environment[b"ODD"] == b"\xff"
    with Descriptor(os.pidfd_open(os.getpid())) as pidfd:
        Version(os.getpid(), pidfd, start, since := now()).write(client, "web.deployed")
    version = Version.read(client, "web.deployed")
    assert version is not None
    assert (version.pid, version.start, version.since) == (os.getpid(), start, since)
    assert not version.has_ended()
    version.close()
    (entry,) = client.infos()
    assert (entry.kind, entry.count) == ("deployment", 2)


def test_no_version_and_what_is_none(client: Client) -> None:
    assert Version.read(client, "web.deployed") is None
    with open("/proc/version") as file:
        client.register("web.deployed", file)
    with pytest.raises(click.ClickException, match="no version that this user has deployed"):
        Version.read(client, "web.deployed")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_a_version_of_another_user_is_not_believed(shell: Shell, folder: Path) -> None:
    """Its pid would be signalled, and its command run, with the rights of this user."""
    policy = folder / "policy.toml"
    policy.write_text(
        """
        [[rule]]
        effect = "allow"
        users = [65534]
        verbs = ["register", "fetch", "info"]
        names = ["web.*"]
        """
    )
    folder.chmod(0o755)
    shell.serve("--mode", "0666", "--policy", policy)
    code = (
        "import os, fdshare.cli.support.deployment as d, fdshare.kinds\n"
        "from fdshare import connect; from fdshare.kernel.descriptor import Descriptor\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "victim = Descriptor(os.pidfd_open(os.getppid()))\n"
        "start = d.ProgramStart([b'web'], [b'id'], b'/', {})\n"
        "with victim, connect(trust=[0]) as client:\n"
        "    d.Version(1, victim, start, '').write(client, 'web.previous')"
    )
    subprocess.run([sys.executable, "-c", code], env=shell.environment, check=True, timeout=60)
    line = shell.fails("deploy", "--rollback", "web")
    assert "registered by uid 65534" in line


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_a_version_of_another_user_cannot_be_stopped() -> None:
    """Which is told before a new version runs beside it."""
    code = (
        "import os, fdshare.cli.support.deployment as d\n"
        "from fdshare.kernel.descriptor import Descriptor\n"
        "with Descriptor(os.pidfd_open(os.getppid())) as theirs:\n"
        "    old = d.Version(os.getppid(), theirs, d.ProgramStart([], [], b'', {}), '')\n"
        "    old.check_may_stop()\n"
        "    os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "    old.check_may_stop()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert "belongs to another user" in done.stderr


def test_one_deploys_at_a_time(client: Client, fdshare: Shell) -> None:
    waiting, done = threading.Event(), threading.Event()

    def second() -> None:
        with connect(fdshare.path) as other, deploying(other, "web", waiting.set):
            done.set()

    thread = threading.Thread(target=second)
    with deploying(client, "web", None):
        thread.start()
        assert waiting.wait(30)
        assert not done.is_set()
        with (
            connect(fdshare.path) as other,
            pytest.raises(click.ClickException, match="another"),
            deploying(other, "web", None),
        ):
            pass
    thread.join(30)
    assert done.is_set()
    assert client.names() == []
