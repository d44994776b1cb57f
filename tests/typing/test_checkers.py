"""What a type checker says of small programs that use fdshare.

All of accepted/ is right: mypy --strict and pyright find nothing there. In refused/ each line that
ends in "# refused" is wrong, and both find an error in it, and in no other.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import fdshare

HERE = Path(__file__).parent
ROOT = Path(fdshare.__file__).parent.parent
SECONDS = 300

Places = set[tuple[str, int]]


def marked() -> Places:
    """The lines that are to be refused: (file, number)."""
    return {
        (f"{path.parent.name}/{path.name}", number)
        for folder in ("accepted", "refused")
        for path in (HERE / folder).glob("*.py")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if line.endswith("# refused")
    }


def run(*command: str) -> str:
    """What it prints; it may exit with 1, which is to say that it found something."""
    paths = {} if "site-packages" in ROOT.parts else {"MYPYPATH": str(ROOT)}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=SECONDS, cwd=HERE, env=os.environ | paths
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return done.stdout


@pytest.mark.timeout(SECONDS)
@pytest.mark.skipif(find_spec("mypy") is None, reason="no mypy")
def test_mypy(tmp_path: Path) -> None:
    output = run(
        *(sys.executable, "-m", "mypy", "--strict", "--config-file=", "--explicit-package-bases"),
        *("--follow-imports=silent", f"--cache-dir={tmp_path}", "accepted", "refused"),
    )
    found = re.findall(r"^(\S+\.py):(\d+): error", output, re.MULTILINE)
    assert {(path, int(line)) for path, line in found} == marked(), output


@pytest.mark.timeout(SECONDS)
@pytest.mark.skipif(shutil.which("pyright") is None, reason="no pyright")
def test_pyright() -> None:
    # The package of PyPI is a starter: it fetches pyright itself from npm's registry, once.
    if subprocess.run(["pyright", "--version"], capture_output=True, check=False).returncode:
        pytest.skip("pyright does not start: npm's registry cannot be reached")
    settings = "--outputjson", "--pythonpath", sys.executable
    told = json.loads(run("pyright", *settings, "accepted", "refused"))["generalDiagnostics"]
    found = {
        (str(Path(one["file"]).relative_to(HERE)), one["range"]["start"]["line"] + 1)
        for one in told
        if one["severity"] == "error"
    }
    assert found == marked(), json.dumps(told, indent=1)
