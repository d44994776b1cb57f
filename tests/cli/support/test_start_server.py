"""run --start: a server for who finds none."""

from __future__ import annotations

import os
import select
import subprocess
from pathlib import Path

import pytest
from commandline import Shell
from users import needs_root

from fdshare.activation import NotifySocket

pytestmark = pytest.mark.usefixtures("fresh")


def test_start_a_server_if_none_answers(shell: Shell, folder: Path) -> None:
    done = shell.run("run", "--start", "web=tcp://127.0.0.1:0", "--", "true")
    assert done.returncode == 0
    assert done.stderr == f"fdshare: started a server at {shell.path}\n"
    pid = shell.json("stats")["keeper_pid"]
    # It holds nothing of ours, and is nobody's child.
    links = [os.readlink(f"/proc/{pid}/fd/{number}") for number in (0, 1, 2)]
    assert links == ["/dev/null", "/dev/null", f"{shell.path}.log"]
    stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    assert int(stat[1]) != os.getpid()
    assert int(stat[3]) != os.getsid(0)
    # The second finds the first.
    assert shell.run("run", "--start", "web", "--", "true").stderr == ""
    shell("stop")


def test_it_is_no_part_of_the_service_that_starts_it(shell: Shell, folder: Path) -> None:
    with NotifySocket(str(folder / "notify")) as told:
        environment = {"NOTIFY_SOCKET": told.address}
        done = shell.run("run", "--start", "w=tcp://127.0.0.1:0", "--", "true", env=environment)
        assert done.returncode == 0
        shell("stop")
        assert select.select([told], [], [], 0)[0] == []


def test_two_starters_start_one_server(shell: Shell) -> None:
    both = [
        shell.start("run", "--start", "web=tcp://127.0.0.1:0", "--", "true", stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    for process in both:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    assert len(shell.json("ls")) == 1


def test_a_log_that_cannot_be_made_says_why(shell: Shell, folder: Path) -> None:
    path = folder / "nothing" / "s.sock"
    line = shell.fails("run", "--start", "--path", path, "web", "--", "true")
    assert f"mkdir -p {folder}/nothing" in line


def test_a_server_that_cannot_start_says_why(shell: Shell, folder: Path) -> None:
    blocked = folder / "file"
    blocked.touch()
    line = shell.fails("run", "--start", "--path", blocked, "web", "--", "true")
    assert "it is a regular file, not a socket" in line


@needs_root
@pytest.mark.parametrize("kind", ["file", "pipe"])
@pytest.mark.parametrize("words", [["serve", "--detach"], ["run", "--start", "w", "--", "true"]])
def test_a_log_that_is_another_user_s_is_not_written(
    shell: Shell, folder: Path, kind: str, words: list[str]
) -> None:
    """In a folder that others may write: its owner reads it, and changes what it says."""
    log = Path(f"{shell.path}.log")
    if kind == "file":
        log.touch()
    else:
        os.mkfifo(log)
    os.chown(log, 12345, 12345)
    said = shell.fails(*words)
    what = {"file": "a regular file", "pipe": "a FIFO"}[kind]
    assert f"{log}: it is {what} of uid 12345; remove it, or choose another path" in said
    if kind == "file":
        assert log.read_text() == ""
    assert shell.run("ping").returncode == 69


@pytest.mark.parametrize(
    "words", [["serve", "--detach"], ["run", "--start", "w=tcp://127.0.0.1:0", "--", "true"]]
)
def test_the_folder_of_the_default_path_is_made(
    shell: Shell, folder: Path, words: list[str]
) -> None:
    """Where a message names that path: "mkdir -p", as another one said, makes a folder that is
    refused."""
    own = folder / f"fdshare-{os.geteuid()}"
    shell.path = str(own / "fdshare.sock")
    shell.environment |= {"TMPDIR": str(folder), "FDSHARE_PATH": shell.path}
    if words[0] == "serve":
        words = [*words, shell.path]
    done = shell.run(*words)
    assert done.returncode == 0, done
    assert own.stat().st_mode & 0o777 == 0o700
    shell("stop")
