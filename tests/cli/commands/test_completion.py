"""completion: commands, options and names, as the shells ask for them."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from commandline import Shell


def complete(shell: Shell, *words: str) -> list[str]:
    env = {
        "_FDSHARE_COMPLETE": "bash_complete",
        "COMP_WORDS": " ".join(["fdshare", *words]),
        "COMP_CWORD": str(len(words)),
    }
    done = subprocess.run(
        [shutil.which("fdshare", path=shell.environment["PATH"]) or "fdshare"],
        env={**shell.environment, **env},
        capture_output=True,
        text=True,
        check=True,
    )
    return [line.partition(",")[2] for line in done.stdout.split()]


@pytest.fixture(autouse=True)
def installed(shell: Shell) -> None:
    if shutil.which("fdshare", path=shell.environment["PATH"]) is None:
        pytest.skip("fdshare is not installed, only importable")


@pytest.mark.parametrize("name", ["bash", "zsh", "fish"])
def test_the_scripts(shell: Shell, name: str) -> None:
    said = shell("completion", name)
    assert "_FDSHARE_COMPLETE" in said
    if name == "bash" and shutil.which("bash"):
        subprocess.run(["bash", "-n"], input=said, text=True, check=True)


def test_commands_and_options(shell: Shell) -> None:
    assert {"watch", "wait", "who"} <= set(complete(shell, "w"))
    assert "--json" in complete(shell, "ls", "--")


def test_names(fdshare: Shell) -> None:
    fdshare("register", "web/http", "--memory", "/dev/null")
    fdshare("register", "log", "--memory", "/dev/null")
    assert complete(fdshare, "info", "we") == ["web/http"]
    assert complete(fdshare, "rm", "") == ["log", "web/http"]


def test_programs_to_run_verbs_and_users(fdshare: Shell) -> None:
    fdshare("register", "web/http", "--memory", "/dev/null")
    for command in ("run", "deploy"):
        assert complete(fdshare, command, "we") == ["web/http"]
    assert complete(fdshare, "explain", "fe") == ["fetch"]
    assert complete(fdshare, "explain", "fetch", "we") == ["web/http"]
    assert "root" in complete(fdshare, "explain", "--uid", "ro")


def test_no_server_is_no_trouble(shell: Shell) -> None:
    assert complete(shell, "info", "we") == []
