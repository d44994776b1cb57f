"""manual: a page that man(1) takes."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from commandline import Shell

from fdshare.cli.main import _FAMILIES


def test_every_command_is_in_it(shell: Shell) -> None:
    page = shell("manual")
    for command in _FAMILIES:
        assert f"\n.SS fdshare {command} " in page


def test_groff_has_no_complaint(shell: Shell) -> None:
    program = shutil.which("groff") or shutil.which("mandoc")
    if program is None:
        pytest.skip("neither groff nor mandoc is installed")
    options = ["-man", "-Tutf8", "-ww"] if program.endswith("groff") else ["-Tlint"]
    done = subprocess.run(
        [program, *options], input=shell("manual"), capture_output=True, text=True, timeout=60
    )
    assert done.stderr == ""
    assert "fdshare run" in done.stdout or program.endswith("mandoc")
