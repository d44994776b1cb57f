"""Text of others: no command prints it so that a terminal obeys it, or a reader is deceived."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from breaking import Wire
from commandline import Shell

from fdshare.protocol import messages as m

# A title for the terminal, a colour, a line of its own, C1, bidirectional marks.
EVIL = "\x1b]0;owned\x07\x1b[31m\nforged\r\x7f\x85\x9b31m\u200b\u2028\u202e\u2066"
NAME = "a/\u202eevil\u2066\u200b\u2028x"  # what a name may have

# Registers as a process whose command line, thread and file have such text.
STRANGER = """
import os, sys, fdshare
evil, address, name, folder = sys.argv[1:5]
with open("/proc/self/comm", "w") as file:
    file.write(evil[:15])
path = os.path.join(folder, evil + chr(0xdcff))
with fdshare.connect(address) as client, open(path, "w") as file:
    client.register(name, file, metadata={evil: evil})
"""


@pytest.fixture
def hostile(fdshare: Shell) -> Shell:
    """Commands, with a server that holds what such a process registered, and a kind of nobody's."""
    subprocess.run(
        [sys.executable, "-c", STRANGER, EVIL, fdshare.path, NAME, str(fdshare.folder)],
        check=True,
        env=fdshare.environment,
    )
    kind = m.Kind(EVIL, msgspec.Raw(m.encode(None)))
    with Wire(fdshare.path) as wire, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"\0{os.getpid()}{EVIL}")
        listener.listen()
        wire.ask(1, m.Register("odd", kind, metadata={EVIL: EVIL}), [listener.fileno()])
    return fdshare


COMMANDS = [
    ["ls"],
    ["ls", "--json"],
    ["info", NAME],
    ["info", "odd"],
    ["info", "odd", "--json"],
    ["who", NAME],
    ["who", "odd"],
    ["who", "odd", "--json"],
    ["explain", "fetch", NAME],
    ["stats"],
    ["stats", "--json"],
    ["stats", "--prometheus"],
    ["doctor"],
    ["info", EVIL],
    ["fetch", EVIL],
    ["fetch", "odd"],
    ["take", "odd"],
    ["rm", EVIL],
    ["mv", NAME, EVIL],
    ["mv", NAME, "odd"],
    ["run", f"{EVIL}=tcp://127.0.0.1:0", "--", "true"],
    ["run", "odd=tcp://127.0.0.1:1", "--", "true"],
    ["run", "--", EVIL],
    ["wait", EVIL],
    ["info", "\udcff"],
    [EVIL],
]


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: ascii(words)[:60])
def test_no_command_prints_it_as_it_came(hostile: Shell, words: list[str]) -> None:
    done = hostile.run(*words)
    printed = (done.stdout + done.stderr).split("\n")
    assert any(printed)
    assert [line for line in printed if not line.isprintable()] == []
    assert not any(line.startswith("forged") for line in printed)


def test_a_watch_does_not(hostile: Shell) -> None:
    watch = hostile.start("watch")
    assert watch.stdout is not None
    first = watch.stdout.readline()
    hostile("rm", NAME)
    second = watch.stdout.readline()
    assert "evil" in first
    assert "evil" in second
    assert (first + second).replace("\n", "").isprintable()


def test_what_copies_entries_does_not(hostile: Shell, folder: Path) -> None:
    (folder / "other").mkdir()
    other = Shell(folder / "other")
    other.serve("--no-keeper")
    dump = hostile("dump")
    (folder / "dump").write_text(dump)
    said = [
        dump,
        hostile("transfer", hostile.path, other.path),
        hostile.run("transfer", hostile.path, other.path).stderr,
        other("load", folder / "dump", "--replace"),
    ]
    for text in said:
        assert "evil" in text
        assert text.replace("\n", "").isprintable()
    other.close()
