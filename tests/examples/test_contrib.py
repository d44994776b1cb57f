"""What contrib/ offers to service managers is what they accept."""

from __future__ import annotations

import configparser
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commandline import ROOT

from fdshare.cli.main import _FAMILIES

SYSTEMD = ROOT / "contrib" / "systemd"
UNITS = ["fdshare.service", "fdshare.socket", "example-web/example-web.service"]


def test_systemd_accepts_the_units(folder: Path) -> None:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd-analyze is not installed (Debian: systemd)")
    for unit in UNITS:
        # It looks whether the program is there; here it may be anywhere.
        text = (SYSTEMD / unit).read_text().replace("/usr/bin/fdshare", sys.executable)
        (folder / Path(unit).name).write_text(text)
    done = subprocess.run(
        [program, "verify", *(str(folder / Path(unit).name) for unit in UNITS)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    # Units of the machine itself may have faults of their own.
    ours = [line for line in done.stderr.splitlines() if str(folder) in line or "fdshare" in line]
    assert ours == []


def test_what_the_promises_stand_on() -> None:
    unit = configparser.RawConfigParser(strict=False)
    unit.read(SYSTEMD / "fdshare.service")
    service = unit["Service"]
    assert service["Type"] == "notify"
    assert service["NotifyAccess"] == "all"
    assert service["ExitType"] == "cgroup"
    assert unit["Unit"]["StartLimitIntervalSec"] == "0"
    assert service["SuccessExitStatus"] == "SIGKILL"
    assert service["OOMPolicy"] == "continue"
    assert int(service["FileDescriptorStoreMax"]) > 0
    assert "--fdstore" in service["ExecStart"]


def test_the_commands_exist() -> None:
    units = [SYSTEMD / unit for unit in UNITS]
    for file in [*units, ROOT / "contrib" / "supervisord" / "fdshare.conf"]:
        for line in file.read_text().splitlines():
            key, _, command = line.partition("=")
            if key in ("ExecStart", "ExecReload", "command"):
                words = command.lstrip("+").split()
                assert words[0].endswith("fdshare")
                assert words[1] in _FAMILIES
