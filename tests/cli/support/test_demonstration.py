"""demonstration: what it says when a step fails."""

from __future__ import annotations

import subprocess
import sys


def test_a_step_that_fails() -> None:
    code = (
        "import resource, sys; from fdshare.cli.support.demonstration import run\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (12, 12)); sys.exit(run(sys.stdout))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAILED" in done.stdout
    assert "All of it" not in done.stdout
