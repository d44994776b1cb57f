"""Options that commands share: users, trust, authkeys."""

from __future__ import annotations

import os
from pathlib import Path

import click
import pytest
from commandline import Shell

from fdshare.cli.options import authkey_from_environment, client_at, uid_of


def test_users_by_name_and_number() -> None:
    assert uid_of("root") == 0
    assert uid_of("4321") == 4321
    with pytest.raises(click.BadParameter):
        uid_of("no-such-user-anywhere")


def test_the_authkey_is_what_stands_in_the_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FDSHARE_AUTHKEY_FILE", raising=False)
    assert authkey_from_environment() is None
    (folder / "key").write_bytes(b"secret\n")
    monkeypatch.setenv("FDSHARE_AUTHKEY_FILE", str(folder / "key"))
    assert authkey_from_environment() == b"secret"


def test_a_client_is_not_connected_yet() -> None:
    with client_at("/nobody/there", ["4321"]) as client:
        assert client.address == "/nobody/there"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_a_server_of_another_user_must_be_trusted(shell: Shell) -> None:
    shell.folder.chmod(0o777)
    # Imported before it becomes another user, who may not be able to read the library.
    code = (
        "import os, sys, fdshare.cli.commands.serve, fdshare.cli.main;"
        "import fdshare.manager, fdshare.server.serve, ipaddress;"
        "os.setgid(65534); os.setuid(65534);"
        "from fdshare.cli.main import run;"
        "sys.exit(run(['serve', '--no-keeper', '--mode', '0666', *sys.argv[1:]]))"
    )
    import subprocess
    import sys

    reads, writes = os.pipe()
    with open(reads, "rb") as ready:
        process = subprocess.Popen(
            [sys.executable, "-c", code, "--ready-fd", str(writes), "--log-level", "warning"],
            env=shell.environment,
            pass_fds=[writes],
        )
        os.close(writes)
        try:
            assert ready.read() == b"\n"
            line = shell.fails("ls")
            assert "runs as uid 65534, neither yours nor root" in line
            assert "give --trust USER" in line
            assert shell("ls", "--trust", "65534")
            # The server that a dump names is trusted as the one that it is loaded into.
            held = shell.folder / "held.json"
            shell("register", "x", "--memory", "/proc/version", "--trust", "65534")
            shell("dump", held, "--trust", "65534")
            assert "neither yours" in shell.fails("load", held)
            shell("load", "--replace", held, "--trust", "65534")
        finally:
            process.terminate()
            process.wait(30)
