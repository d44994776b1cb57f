"""serve --detach: what is left in the background, and what the caller learns."""

from __future__ import annotations

import os
import select
import subprocess
from pathlib import Path

from commandline import FDSHARE, Shell

from fdshare.activation import NotifySocket


def test_it_returns_when_clients_can_connect(shell: Shell) -> None:
    """Captured, as a script does it: the server keeps no pipe of its caller."""
    done = subprocess.run(
        [*FDSHARE, "serve", "--detach", "--log-level", "warning"],
        env=shell.environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    keeper = shell.json("stats")["keeper_pid"]
    assert done.stdout == f"serving at {shell.path}, pid {keeper}\n"
    links = [os.readlink(f"/proc/{keeper}/fd/{number}") for number in range(3)]
    assert links == ["/dev/null", f"{shell.path}.log", f"{shell.path}.log"]
    assert os.readlink(f"/proc/{keeper}/cwd") == "/"
    assert Path(f"{shell.path}.log").read_text() == ""
    shell("stop")


def test_it_is_no_part_of_the_service_that_starts_it(shell: Shell, folder: Path) -> None:
    with NotifySocket(str(folder / "notify")) as told:
        shell("serve", "--detach", env={"NOTIFY_SOCKET": told.address})
        shell("stop")
        assert select.select([told], [], [], 0)[0] == []


def test_a_server_that_cannot_start_says_why(shell: Shell, folder: Path) -> None:
    shell.serve()
    assert "a live server" in shell.fails("serve", "--detach")
    line = shell.fails("serve", "--detach", folder / "nothing" / "s")
    assert "mkdir -p" in line
    line = shell.fails("serve", "--detach", folder / "other", "--policy", folder / "none.toml")
    assert line.startswith(f"fdshare: {folder}/none.toml")
    assert not (folder / "other").exists()


def test_paths_are_of_the_folder_of_the_caller(shell: Shell, folder: Path) -> None:
    (folder / "policy.toml").write_text("")
    words = ["serve", "--detach", "--policy", "policy.toml", "here.sock"]
    shell.path = str(folder / "here.sock")
    shell.environment["FDSHARE_PATH"] = shell.path
    assert shell(*words, cwd=folder).startswith(f"serving at {folder}/here.sock, pid ")
    shell("reload")
    shell("stop")


def test_what_does_not_go_together(shell: Shell) -> None:
    assert "--ready-fd" in shell.fails("serve", "--detach", "--ready-fd", "1", status=2)
    env = {"LISTEN_FDS": "1"}
    assert "service manager" in shell.fails("serve", "--detach", status=2, env=env)
