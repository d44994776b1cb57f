"""finaliser: what a __del__ raises is said, but for the end of the interpreter."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
from fdshare.kernel.finaliser import finaliser

class Left:
    def __init__(self, name):
        self.name = name

    @finaliser
    def __del__(self):
        print(self.name, flush=True)
        raise ValueError(self.name)

Left("early")
left = Left("late")
"""


def test_only_the_end_is_silent() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "early\nlate\n")
    assert "ValueError: early" in done.stderr
    assert "ValueError: late" not in done.stderr
