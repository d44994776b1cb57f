"""doctor: what it finds, and what it says to do."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from commandline import Shell


def findings(shell: Shell, status: int, *words: str) -> dict[str, tuple[str, str]]:
    said = shell.json("doctor", *words, status=status) if status == 0 else None
    if said is None:
        import json

        done = shell.run("doctor", "--json", *words)
        assert done.returncode == status, done
        said = json.loads(done.stdout)
    return {f["subject"]: (f["health"], f["text"] + " " + f["advice"]) for f in said}


def test_all_is_well(shell: Shell) -> None:
    shell.serve()
    found = findings(shell, 0)
    assert found["path"] == ("ok", f"{shell.path} (by $FDSHARE_PATH) ")
    assert found["server"][0] == "ok"
    assert found["keeper"][0] == "ok"
    said = shell("doctor", env={"COLUMNS": "80"})
    assert said.startswith("ok ")
    assert "bad" not in said


def test_no_keeper_is_noted(fdshare: Shell) -> None:
    health, text = findings(fdshare, 0)["keeper"]
    assert health == "note"
    assert "kill -9" in text


def test_no_server(shell: Shell) -> None:
    found = findings(shell, 1)
    assert found["socket"][0] == "note"
    assert found["server"][0] == "bad"
    assert f"fdshare serve {shell.path}" in found["server"][1]


def test_a_stale_socket(shell: Shell) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(shell.path)
    health, text = findings(shell, 1)["server"]
    assert health == "bad"
    assert "stale socket" in text


def test_something_else_is_there(shell: Shell) -> None:
    Path(shell.path).touch()
    health, text = findings(shell, 1)["socket"]
    assert health == "bad"
    assert "a regular file" in text


def test_a_folder_that_anybody_can_write(shell: Shell) -> None:
    os.chmod(shell.folder, 0o777)
    health, text = findings(shell, 1)["folder"]
    assert health == "bad"
    assert f"chmod o-w {shell.folder}" in text


def test_a_folder_that_is_not_there(shell: Shell) -> None:
    found = findings(shell, 1, "--path", str(shell.folder / "no" / "s"))
    assert found["folder"][0] == "bad"


def test_a_limit_that_is_nearly_reached(shell: Shell) -> None:
    shell.serve("--no-keeper", "--limit", "max_names=1")
    shell("register", "one", "--memory", "/dev/null")
    health, text = findings(shell, 1)["max_names"]
    assert health == "bad"
    assert "--limit max_names=" in text
