"""Programs of a user who can start no process for a while: RLIMIT_NPROC is reached.

`run_crowded` runs such a program, for root; there, `Crowd` reaches the limit.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

from users import few_processes

from fdshare.mp.context import Context

_ENOUGH = 100
# What the program may have outside the block. A fork server keeps the limit that it starts with,
# and one that died in a block is started again after it. In the block others reach this limit.
_USUAL = 32
# Starts that many others, and ends them, whenever a line comes.
_OTHERS = f"""
import os, signal, sys
others = []
for _ in sys.stdin:
    if not others:
        for _ in range({_USUAL}):
            others.append(os.fork())
            if not others[-1]:
                signal.pause()
    else:
        while others:
            os.kill(others[-1], signal.SIGKILL)
            os.waitpid(others.pop(), 0)
    print(flush=True)
for other in others:
    os.kill(other, signal.SIGKILL)
"""


def run_crowded(code: str, *args: str) -> tuple[str, str]:
    """What *code* prints, to its output and its error output. It imports from this folder."""
    done = subprocess.run(
        [sys.executable, "-c", code, *args],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=few_processes(_ENOUGH),
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


class Crowd:
    """In its `with` block neither this program nor its fork server can start a process."""

    def __init__(self, ctx: Context) -> None:
        self._others = subprocess.Popen(
            [sys.executable, "-c", _OTHERS], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        _limit(_USUAL)
        first = ctx.Process(target=os.getpid)
        first.start()
        first.join()

    def __enter__(self) -> None:
        self._change()
        _limit(1)

    def __exit__(self, *exc: object) -> None:
        self._change()
        _limit(_USUAL)

    def _change(self) -> None:
        assert self._others.stdin
        assert self._others.stdout
        self._others.stdin.write(b"\n")
        self._others.stdin.flush()
        assert self._others.stdout.readline()


def _limit(most: int) -> None:
    resource.setrlimit(resource.RLIMIT_NPROC, (most, _ENOUGH))


def children() -> int:
    """How many children this program has, fork servers and resource trackers apart."""
    pids = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    lines = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids]
    return sum(b"resource_tracker" not in line and b"forkserver" not in line for line in lines)
