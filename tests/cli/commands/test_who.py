"""who: the processes that have it open now."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from commandline import FDSHARE, Shell
from users import needs_root

HOLD = "import sys; print('up', flush=True); sys.stdin.read()"


def test_who(fdshare: Shell) -> None:
    process = fdshare.start(
        "run",
        "web=tcp://127.0.0.1:0",
        "--",
        sys.executable,
        "-c",
        HOLD,
        stdin=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.readline()
    found = {holder["pid"]: holder for holder in fdshare.json("who", "web")}
    server = fdshare.json("stats")["server_pid"]
    assert set(found) == {server, process.pid}
    assert found[server]["half"] == "server"
    assert found[process.pid]["fds"] == [3]
    said = fdshare("who", "web", env={"COLUMNS": "80"})
    head, *rows = said.splitlines()
    assert head.split() == ["PID", "USER", "FDS", "HOW", "COMMAND"]
    assert len(rows) == 2
    assert all(len(row) <= 80 for row in rows)
    assert "fdshare server:" in said
    assert fdshare.json("info", "web")["fetches"] == 1


# As a container does it: kcmp(2) is EPERM. seccomp(2), SECCOMP_MODE_FILTER; struct sock_filter.
WITHOUT_KCMP = """
import ctypes, struct, sys
from fdshare.kernel.open_file import _SYS_KCMP
filter = b"".join(struct.pack("HBBI", *instruction) for instruction in [
    (0x20, 0, 0, 0),              # load the number of the system call
    (0x15, 0, 1, _SYS_KCMP),      # is it kcmp?
    (0x06, 0, 0, 0x00050001),     # SECCOMP_RET_ERRNO | EPERM
    (0x06, 0, 0, 0x7FFF0000),     # SECCOMP_RET_ALLOW
])
buffer = ctypes.create_string_buffer(filter)
program = ctypes.create_string_buffer(struct.pack("HP", 4, ctypes.addressof(buffer)))
libc = ctypes.CDLL(None, use_errno=True)
if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, program, 0, 0):
    sys.exit(77)
from fdshare.cli.main import run
sys.exit(run(sys.argv[1:]))
"""


def test_without_kcmp_the_inode_has_to_do(fdshare: Shell) -> None:
    fdshare("register", "web", "--listen", "tcp://127.0.0.1:0")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_KCMP, "who", "web", "--json"],
        env=fdshare.environment,
        capture_output=True,
        text=True,
    )
    if done.returncode == 77:
        pytest.skip("seccomp filters are not allowed here")
    (server,) = json.loads(done.stdout)
    assert server["half"] == "server"
    assert server["how"] == "inode"


@needs_root
def test_in_another_pid_namespace_it_says_that_it_sees_nothing(fdshare: Shell) -> None:
    fdshare("register", "web", "--listen", "tcp://127.0.0.1:0")
    done = subprocess.run(
        ["unshare", "--pid", "--fork", "--mount-proc", *FDSHARE, "who", "web"],
        env=fdshare.environment,
        capture_output=True,
        text=True,
    )
    if done.stderr.startswith("unshare:"):
        pytest.skip(done.stderr)
    assert done.stdout.split() == ["PID", "USER", "FDS", "HOW", "COMMAND"]
    assert done.stderr.startswith("fdshare: no process of the server is seen here: ")


def test_who_of_nothing(fdshare: Shell) -> None:
    assert "nothing is held" in fdshare.fails("who", "web")
