"""systemd-units: the units, for the place where fdshare is."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commandline import ROOT, Shell

from fdshare.cli.commands.systemd_units import _quoted

UNITS = ["fdshare.service", "fdshare.socket"]


@pytest.mark.parametrize("options", [[], ["--user"]])
def test_they_name_this_fdshare(shell: Shell, folder: Path, options: list[str]) -> None:
    said = shell.run("systemd-units", "--dir", folder / "units", *options)
    assert said.stdout.split() == [str(folder / "units" / name) for name in UNITS]
    assert f"systemctl {' '.join(options)}".strip() + " daemon-reload" in said.stderr
    service, sock = ((folder / "units" / name).read_text() for name in UNITS)
    assert f"ExecStart={sys.executable} -m fdshare serve --fdstore\n" in service
    assert "/usr/bin" not in service
    path = "%t/fdshare.sock" if options else "/run/fdshare.sock"
    assert f"ListenStream={path}\n" in sock
    assert f"fdshare reload --path {path}\n" in service
    # What the systemd of a user cannot do, and whom it starts things for.
    for line in ("CapabilityBoundingSet=", "SystemCallFilter=", "WantedBy=multi-user.target"):
        assert (line in service) != bool(options)
    assert ("WantedBy=default.target" in service) == bool(options)


def test_but_for_that_they_are_those_of_contrib(shell: Shell, folder: Path) -> None:
    shell.run("systemd-units", "--dir", folder)
    for name in UNITS:
        shipped = (ROOT / "contrib" / "systemd" / name).read_text()
        written = (folder / name).read_text()
        assert written == shipped.replace("/usr/bin/fdshare", f"{sys.executable} -m fdshare")


def test_one_that_was_changed_stays(shell: Shell, folder: Path) -> None:
    shell.run("systemd-units", "--dir", folder)
    assert shell.run("systemd-units", "--dir", folder).returncode == 0
    before = (folder / UNITS[0]).read_text()
    (folder / UNITS[0]).write_text("mine")
    assert "--force" in shell.fails("systemd-units", "--dir", folder)
    assert (folder / UNITS[0]).read_text() == "mine"
    shell.run("systemd-units", "--dir", folder, "--force")
    assert (folder / UNITS[0]).read_text() == before


def test_a_user_has_them_in_his_own_folder(shell: Shell, folder: Path) -> None:
    for variable, place in (
        ({"XDG_CONFIG_HOME": str(folder / "config")}, folder / "config"),
        ({"XDG_CONFIG_HOME": "", "HOME": str(folder)}, folder / ".config"),
    ):
        shell.run("systemd-units", "--user", env=variable)
        assert (place / "systemd" / "user" / UNITS[0]).exists()


@pytest.mark.parametrize("options", [[], ["--user"]])
def test_systemd_has_no_complaint(shell: Shell, folder: Path, options: list[str]) -> None:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd-analyze is not installed (Debian: systemd)")
    shell.run("systemd-units", "--dir", folder, *options)
    done = subprocess.run(
        [program, "verify", *options, *(str(folder / name) for name in UNITS)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**shell.environment, "XDG_RUNTIME_DIR": str(folder)},
    )
    # Units of the machine itself may have faults of their own.
    assert [line for line in done.stderr.splitlines() if "fdshare" in line] == []


@pytest.mark.parametrize(
    ("path", "word"),
    [
        ("/usr/bin/fdshare", "/usr/bin/fdshare"),
        ("/a b/fdshare", '"/a b/fdshare"'),
        ("/50%/$x", "/50%%/$$x"),
        ('/"q"\\', '"/\\"q\\"\\\\"'),
    ],
)
def test_a_path_as_a_word_of_a_unit(path: str, word: str) -> None:
    assert _quoted(path) == word
