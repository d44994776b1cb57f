"""`fdshare run` as the program of a unit."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from conftest import wait_until

from .container import ROOT
from .service import Service, journal, properties, run, systemctl

PROGRAM = Path("/etc/fdshare-run.py")
CODE = """
import fdshare, time
fdshare.notify("READY=1\\nSTATUS=here")
time.sleep(1000)
"""


@pytest.fixture
def unit(service: Service) -> Service:
    service.write("fdshare.socket.d/test.conf", "[Socket]\nSocketMode=0666\n")
    with open("/etc/fdshare-run.toml", "w") as policy:
        policy.write('[[rule]]\neffect = "allow"\nusers = ["daemon"]\nverbs = ["*"]\n')
    service.dropin(serve="--policy /etc/fdshare-run.toml")
    systemctl("restart", "fdshare.socket")
    return service


def write(service: Service, lines: str) -> None:
    PROGRAM.write_text(CODE)
    service.write(
        "fdshare.run.service",
        f"[Service]\nType=notify\nEnvironment=PYTHONPATH={ROOT}\nTimeoutStartSec=5\n{lines}\n"
        "ExecStart=/usr/bin/fdshare run --path /run/fdshare.sock --notify "
        f"test=tcp://127.0.0.1:8099 -- {sys.executable} {PROGRAM}\n",
    )


@pytest.mark.parametrize("lines", ["", "NotifyAccess=all", "User=daemon\nNotifyAccess=all"])
def test_its_reports_are_heard(unit: Service, lines: str) -> None:
    write(unit, lines)
    systemctl("start", "fdshare.run.service")
    assert properties("fdshare.run.service", "StatusText") == {"StatusText": "here"}
    assert "NotifyAccess" not in journal("fdshare.run.service", 20)
    systemctl("stop", "fdshare.run.service")


def test_it_says_what_the_unit_needs(unit: Service) -> None:
    write(unit, "User=daemon")
    assert run("systemctl", "start", "fdshare.run.service").returncode
    wait_until(lambda: "NotifyAccess=all" in journal("fdshare.run.service", 20), "the line")
