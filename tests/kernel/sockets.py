"""What the tests of endpoints share: servers that live and die, and what they leave behind."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

from nursery import Process


def python(code: str, *args: object) -> subprocess.Popen[str]:
    return Process(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


LISTEN = """
    import os, sys
    from fdshare.kernel import listen
    with listen(sys.argv[1]) as listener:
        print("ready", flush=True)
        sys.stdin.readline()
        os._exit(9)  # as if killed: nothing is cleaned up
"""


def live_server(path: Path) -> subprocess.Popen[str]:
    child = python(LISTEN, path)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    return child


def die(child: subprocess.Popen[str]) -> None:
    with child:
        child.communicate("\n", timeout=20)
        assert child.wait(20) == 9


def leave_stale(path: Path) -> os.stat_result:
    """A socket file that nobody has open."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
    return path.lstat()


def make_other(kind: str, path: Path) -> None:
    if kind == "file":
        path.write_text("precious")
    elif kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to("somewhere")
