"""manual: pages that man(1) takes, and those in man/, which are installed."""

from __future__ import annotations

import shutil
import subprocess
from configparser import ConfigParser
from pathlib import Path

import click
import pytest
from commandline import ROOT, Shell

from fdshare.cli.commands.manual import pages
from fdshare.cli.main import _FAMILIES, commands

MAN = ROOT / "man"


def groff(page: str) -> str:
    """What a reader sees. Fails on any complaint."""
    program = shutil.which("groff") or shutil.which("mandoc")
    if program is None:
        pytest.skip("neither groff nor mandoc is installed")
    options = ["-man", "-Tutf8", "-ww"] if program.endswith("groff") else ["-Tlint"]
    done = subprocess.run(
        [program, *options], input=page, capture_output=True, text=True, timeout=60
    )
    assert done.stderr == ""
    return done.stdout if program.endswith("groff") else page


def test_every_command_is_in_it(shell: Shell) -> None:
    page = shell("manual")
    for command in _FAMILIES:
        assert f"\n.SS fdshare {command} " in page


def test_groff_has_no_complaint(shell: Shell) -> None:
    assert "fdshare run" in groff(shell("manual"))


def test_each_command_has_a_page(shell: Shell, folder: Path) -> None:
    (folder / "man").mkdir()
    shell("manual", "--folder", str(folder / "man"))
    written = {path.name: path.read_text() for path in (folder / "man").iterdir()}
    assert set(written) == {"fdshare.1", *(f"fdshare-{name}.1" for name in _FAMILIES)}
    for name in _FAMILIES:
        assert f".BR {f'fdshare-{name}'.replace('-', chr(92) + '-')} (1)" in written["fdshare.1"]
    for name, text in written.items():
        assert text.startswith(f".TH {name.removesuffix('.1').upper()} 1 ")
    assert ".B \\-\\-detach\n" in written["fdshare-run.1"]
    for page in written.values():
        groff(page)


def test_those_that_are_installed_are_of_this_release() -> None:
    assert isinstance(commands, click.Group)
    here = {path.name: path.read_text() for path in MAN.glob("*.1")}
    assert here == pages(commands), "write them again: fdshare manual --folder man"
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert config["options.data_files"]["share/man/man1"].strip() == "man/*.1"
