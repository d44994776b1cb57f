"""wait and watch."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from commandline import Shell


def test_watch_prints_an_event_a_line(fdshare: Shell) -> None:
    fdshare("register", "before", "--memory", "/dev/null")
    process = fdshare.start("watch", "--json")
    assert process.stdout is not None
    first = json.loads(process.stdout.readline())
    assert first == {"event": "snapshot", "entries": {"before": 1}, "serial": 1, "reason": "start"}
    fdshare("register", "web", "--memory", "/dev/null")
    fdshare("mv", "web", "web2")
    fdshare("rm", "web2")
    events = [json.loads(process.stdout.readline()) for _ in range(3)]
    assert [(e["event"], e["name"], e["old"]) for e in events] == [
        ("registered", "web", ""),
        ("registered", "web2", "web"),
        ("unregistered", "web2", ""),
    ]
    assert [e["serial"] for e in events] == [2, 3, 4]


def test_watch_in_words(fdshare: Shell) -> None:
    process = fdshare.start("watch", "w*")
    assert process.stdout is not None
    assert process.stdout.readline().split() == ["0", "held:", "nothing"]
    fdshare("register", "other", "--memory", "/dev/null")
    fdshare("register", "web", "--memory", "/dev/null")
    line = process.stdout.readline().split(maxsplit=2)
    assert line == ["2", "registered", "web (generation 2)\n"]


def test_watch_ends_with_its_reader(fdshare: Shell) -> None:
    process = fdshare.start("watch", stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    # Nothing happens, and it ends all the same.
    assert process.wait(30) == 1


def test_wait(fdshare: Shell, folder: Path) -> None:
    process = fdshare.start("wait", "one", "two", "--timeout", "60")
    fdshare("register", "two", "--memory", "/dev/null")
    fdshare("register", "one", "--memory", "/dev/null")
    assert process.wait(30) == 0
    assert fdshare.json("info", "one")["fetches"] == 0
    late = fdshare.fails("wait", "one", "three", "--timeout", "0.01")
    assert late.endswith("nothing was registered under 'three' within 0.01 s")
