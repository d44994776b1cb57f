"""dump, load, transfer: all or nothing, and the very same open files afterwards."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from commandline import FDSHARE, Shell

from fdshare import connect


@pytest.fixture
def other(folder: Path) -> Iterator[Shell]:
    """A second server, empty."""
    (folder / "other").mkdir()
    other = Shell(folder / "other")
    other.serve("--no-keeper")
    yield other
    other.close()


@pytest.fixture
def filled(fdshare: Shell, folder: Path) -> Shell:
    """Three entries: a socket, a file in the middle, memory with time to live and metadata."""
    (folder / "file").write_text("0123456789")
    fdshare("register", "web", "--listen", "tcp://127.0.0.1:0")
    fdshare("register", "file", "--open", folder / "file", "--mode", "rb")
    fdshare("register", "memory", "--memory", folder / "file", "--ttl", "600", "--meta", "a=b")
    return fdshare


def inodes(shell: Shell) -> dict[str, int]:
    found = {}
    with connect(shell.path) as client:
        for name in client.names():
            (descriptor,) = client.fetch_raw(name)
            with descriptor:
                found[name] = os.fstat(descriptor.fileno()).st_ino
    return found


def test_a_dump_is_loaded(filled: Shell, other: Shell, folder: Path) -> None:
    file = folder / "held.json"
    filled("dump", file)
    dumped = json.loads(file.read_text())
    assert dumped["server"] == filled.path
    assert [e["name"] for e in dumped["entries"]] == ["file", "memory", "web"]
    assert other("load", file) == "file\nmemory\nweb\n"
    assert inodes(other) == inodes(filled)
    memory = other.json("info", "memory")
    assert memory["metadata"] == {"a": "b"}
    assert memory["kind"] == "memory"
    assert 590 < memory["ttl"] <= 600


def test_a_dump_is_utf_8_whatever_the_locale_is(fdshare: Shell, other: Shell, folder: Path) -> None:
    fdshare("register", "Grüße, 世界", "--memory", "/proc/version")
    command = [*FDSHARE, "dump", str(folder / "held.json")]
    environment = {**fdshare.environment, "LC_ALL": "C", "PYTHONUTF8": "0"}
    environment["PYTHONCOERCECLOCALE"] = "0"
    subprocess.run(command, env=environment, check=True, timeout=60)
    assert other("load", folder / "held.json") == "Grüße, 世界\n"


def test_the_last_dump_stays_where_no_server_answers(filled: Shell, folder: Path) -> None:
    filled("dump", folder / "held.json")
    dumped = (folder / "held.json").read_text()
    filled("stop")
    filled.fails("dump", folder / "held.json", status=69)
    assert (folder / "held.json").read_text() == dumped


def test_a_dump_to_a_full_disk_fails_and_names_the_file(filled: Shell) -> None:
    assert "/dev/full" in filled.fails("dump", "/dev/full")


def test_a_dump_goes_to_standard_output(filled: Shell) -> None:
    assert len(json.loads(filled("dump", "--pattern", "*e*"))["entries"]) == 3
    assert len(json.loads(filled("dump", "--pattern", "w*"))["entries"]) == 1


def test_transfer_is_all_or_nothing(filled: Shell, other: Shell) -> None:
    other("register", "web", "--memory", "/dev/null")
    before = inodes(other)
    line = filled.fails("transfer", filled.path, other.path)
    assert "'web' is already held" in line
    assert inodes(other) == before
    made = filled.json("transfer", filled.path, other.path, "--replace")
    assert [entry["name"] for entry in made] == ["file", "memory", "web"]
    assert inodes(other) == inodes(filled)


def test_what_was_replaced_comes_back_when_a_later_one_fails(filled: Shell, folder: Path) -> None:
    (folder / "small").mkdir()
    small = Shell(folder / "small")
    try:
        small.serve("--no-keeper", "--limit", "max_names=2")
        small("register", "file", "--memory", "/dev/null")
        before = inodes(small)
        assert "max_names" in filled.fails("transfer", filled.path, small.path, "--replace")
        assert inodes(small) == before
    finally:
        small.close()


def test_move(filled: Shell, other: Shell) -> None:
    before = inodes(filled)
    filled("transfer", filled.path, other.path, "--pattern", "*e*", "--move")
    assert inodes(other) == before
    assert filled.json("ls") == []


def test_an_entry_that_changed_since_the_dump(filled: Shell, other: Shell, folder: Path) -> None:
    file = folder / "held.json"
    filled("dump", file)
    filled("register", "web", "--memory", "/dev/null", "--replace")
    assert "was expected at generation 1" in other.fails("load", file)
    assert other.json("ls") == []


def test_what_lives_as_long_as_its_owner_stays(filled: Shell, other: Shell) -> None:
    filled.start("register", "mine", "--memory", "/dev/null", "--hold")
    filled("wait", "mine", "--timeout", "30")
    assert "mine: bound to" in filled.fails("transfer", filled.path, other.path)
    filled("transfer", filled.path, other.path, "--pattern", "[!m]*")
    assert sorted(inodes(other)) == ["file", "web"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": "x", "server": "y", "entries": []}'])
def test_what_is_no_dump(fdshare: Shell, folder: Path, text: str) -> None:
    file = folder / "bad.json"
    file.write_text(text)
    assert "bad.json" in fdshare.fails("load", file)


def test_a_dump_whose_server_is_gone(filled: Shell, other: Shell, folder: Path) -> None:
    file = folder / "held.json"
    filled("dump", file)
    filled("stop")
    assert "no server at" in other.fails("load", file, status=69)
