"""A program of one's own under systemd: fdshare.listen_fds, fdshare.notify, fdshare.activation."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import wait_until

from .container import ROOT
from .service import UNITS, properties, run, systemctl

PROGRAM = Path("/srv/program.py")
SAID = Path("/run/program.json")
CODE = f"""
import json, os, sys, time
sys.path.insert(0, {str(ROOT)!r})
import fdshare
from fdshare import activation

seconds = activation.watchdog_seconds()
passed = fdshare.listen_fds()
again = fdshare.listen_fds()
kinds = {{
    name: [os.readlink(f"/proc/self/fd/{{d.fileno()}}").partition(":")[0] for d in ds]
    for name, ds in passed.items()
}}
inheritable = [os.get_inheritable(d.fileno()) for ds in passed.values() for d in ds]
if "state" not in passed:
    activation.store("state", [os.memfd_create("state")])
    activation.store("gone", [os.memfd_create("one"), os.memfd_create("other")])
    activation.unstore("gone")
settled = activation.barrier(5)
told = fdshare.notify("READY=1\\nSTATUS=here")
with open({str(SAID)!r} + ".new", "w") as file:
    json.dump([seconds, kinds, again, inheritable, settled, told, os.getpid()], file)
os.rename({str(SAID)!r} + ".new", {str(SAID)!r})
while True:
    fdshare.notify("WATCHDOG=1")
    time.sleep(seconds / 4)
"""


@pytest.fixture
def program() -> Iterator[None]:
    PROGRAM.write_text(CODE)
    (UNITS / "fdshare.program.socket").write_text(
        "[Socket]\nListenStream=127.0.0.1:8123\nListenDatagram=/run/program\n"
        "FileDescriptorName=web\nService=fdshare.program.service\n"
    )
    (UNITS / "fdshare.program.service").write_text(
        f"[Service]\nType=notify\nExecStart={sys.executable} {PROGRAM}\nWatchdogSec=2\n"
        "FileDescriptorStoreMax=10\nRestart=always\nRestartSec=50ms\n"
    )
    systemctl("daemon-reload")
    systemctl("start", "fdshare.program.socket", "fdshare.program.service")
    yield
    run("systemctl", "stop", "fdshare.program.socket", "fdshare.program.service")
    for unit in UNITS.glob("fdshare.program.*"):
        unit.unlink()
    systemctl("daemon-reload")


def said() -> list[Any]:
    """By the program of the last start."""
    wait_until(SAID.exists, "the program says what it got")
    found: list[Any] = json.loads(SAID.read_text())
    SAID.unlink()
    return found


@pytest.mark.usefixtures("program")
def test_it_gets_what_systemd_passes_and_keeps() -> None:
    *facts, first = said()
    assert facts == [2.0, {"web": ["socket", "socket"]}, {}, [False, False], True, True]
    known = properties("fdshare.program.service", "StatusText", "NFileDescriptorStore")
    assert known == {"StatusText": "here", "NFileDescriptorStore": "1"}
    systemctl("kill", "-s", "KILL", "fdshare.program.service")
    _, kinds, *_, second = said()
    assert kinds == {"web": ["socket", "socket"], "state": ["/memfd"]}
    assert first != second
    # systemd ends a program that does not feed its watchdog, and this one was fed until now.
    systemctl("kill", "-s", "STOP", "fdshare.program.service")
    *_, third = said()
    assert third != second
    assert properties("fdshare.program.service", "NRestarts") == {"NRestarts": "2"}
