"""ls and info, for people and as JSON."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

from commandline import Shell


def hold_some(fdshare: Shell, folder: Path) -> int:
    """A socket, a file and sealed memory; the socket's port."""
    (folder / "app.log").write_text("x" * 1204)
    fdshare("register", "web/http", "--listen", "tcp://127.0.0.1:0")
    fdshare("register", "log", "--open", folder / "app.log", "--mode", "a", "--meta", "a=b")
    fdshare("register", "config", "--memory", folder / "app.log", "--ttl", "3600")
    (entry,) = fdshare.json("ls", "web/*")
    return int(entry["descriptors"][0]["local"].rpartition(":")[2])


def test_ls_at_80_columns(fdshare: Shell, folder: Path) -> None:
    port = hold_some(fdshare, folder)
    said = fdshare("ls", env={"COLUMNS": "80"})
    head, *rows = said.splitlines()
    assert head.split() == ["NAME", "KIND", "WHAT", "OWNER", "AGE", "USES", "TTL"]
    assert all(len(row) <= 80 for row in said.splitlines())
    config, log, web = rows
    user = pwd.getpwuid(os.geteuid()).pw_name
    assert config.split()[:6] == ["config", "memory", "memory", "1.2", "KiB", "sealed"]
    assert config.split()[-1] in ("1h", "60m")
    assert f"{folder}/app.log w @1,204" in log
    assert f"tcp 127.0.0.1:{port} listening 0/4096" in web
    assert user in web
    assert "\x1b" not in said


def test_names_alone_and_several_at_once(fdshare: Shell, folder: Path) -> None:
    hold_some(fdshare, folder)
    assert fdshare("ls", "-q") == "config\nlog\nweb/http\n"
    assert fdshare("ls", "-q", "web/*") == "web/http\n"
    said = fdshare("info", "log", "config")
    first, second = said.split("\n\n")
    assert first.split()[:2] == ["name", "log"]
    assert second.split()[:2] == ["name", "config"]
    assert "nothing is held" in fdshare.fails("info", "log", "nope")


def test_a_format_of_ones_own(fdshare: Shell, folder: Path) -> None:
    port = hold_some(fdshare, folder)
    said = fdshare("ls", "--format", "{name}|{local}|{uses}|{metadata[a]}|{lifetime}")
    assert said.splitlines() == [
        "config||0||server",
        "log||0|b|server",
        f"web/http|127.0.0.1:{port}|0||server",
    ]
    assert fdshare("ls", "--format", "{path:.4}\t{generation}", "log") == f"{folder!s:.4}\t2\n"
    fdshare("register", "odd", "--memory", folder / "app.log", "--meta", "a=\x1b[31m")
    assert "\x1b" not in fdshare("ls", "--format", "{metadata[a]}", "odd")


def test_a_format_that_is_wrong(fdshare: Shell, folder: Path) -> None:
    hold_some(fdshare, folder)
    for text, why in {
        "{nmae}": "there is no field 'nmae'; the fields are name, kind,",
        "{name": "expected '}'",
        "{}": "Format string contains positional",
        "{name.nope}": "no attribute",
    }.items():
        assert why in fdshare.run("ls", "--format", text).stderr
        assert fdshare.run("ls", "--format", text).returncode == 2
    assert "give one of" in fdshare.run("ls", "-q", "--json").stderr


def test_ls_shortens_what_does_not_fit_and_nothing_in_a_pipe(fdshare: Shell, folder: Path) -> None:
    deep = folder / ("d" * 100)
    deep.mkdir()
    (deep / "file").touch()
    fdshare("register", "a-name-of-some-length", "--open", deep / "file")
    narrow = fdshare("ls", env={"COLUMNS": "80"}).splitlines()
    assert all(len(line) <= 80 for line in narrow)
    assert "…" in narrow[1]
    assert str(deep / "file") in fdshare("ls")


def test_ls_as_json(fdshare: Shell, folder: Path) -> None:
    port = hold_some(fdshare, folder)
    entries = {entry["name"]: entry for entry in fdshare.json("ls")}
    assert sorted(entries) == ["config", "log", "web/http"]
    web = entries["web/http"]["descriptors"][0]
    assert (web["local"], web["listening"], web["backlog"]) == (f"127.0.0.1:{port}", True, 4096)
    assert entries["log"]["metadata"] == {"a": "b"}
    assert entries["config"]["registrant"]["uid"] == os.geteuid()
    assert [e["name"] for e in fdshare.json("ls", "*o*")] == ["config", "log"]
    assert fdshare.json("ls", "nothing") == []


def test_info(fdshare: Shell, folder: Path) -> None:
    hold_some(fdshare, folder)
    said = fdshare("info", "config")
    assert "config" in said
    assert "memory 1.2 KiB sealed" in said
    assert "1,204 bytes; seals" in said
    assert " s left" in said
    assert "a=b" in fdshare("info", "log")
    found = fdshare.json("info", "config")
    assert found["descriptors"][0]["size"] == 1204
    assert 3500 < found["ttl"] <= 3600
    assert fdshare.fails("info", "nothing") == "fdshare: nothing is held under 'nothing'"
