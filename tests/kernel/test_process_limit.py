"""process_limit: a fork(2) that fails for a limit says for which."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys

from users import few_processes, needs_root

from fdshare.kernel.process_limit import note_limits, too_many, why_not_forked

MANAGER = """
import os
import fdshare
try:
    fdshare.Manager().start()
except fdshare.FdshareError as error:
    print(error)
"""
PARKS = """
import socket
import fdshare, multiprocessing
fdshare.install()
from multiprocessing.reduction import ForkingPickler
with socket.socket() as sock:
    try:
        ForkingPickler.dumps(sock)
    except fdshare.FdshareError as error:
        print(error)
"""


def limited(most: int, code: str) -> str:
    """What *code* prints where its user may have *most* processes."""
    return subprocess.run(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
        check=True,
        preexec_fn=few_processes(most),
    ).stdout


def test_what_is_said_of_other_errors() -> None:
    error = OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
    assert why_not_forked(error) == str(error)


def test_a_limit_is_named() -> None:
    said = why_not_forked(BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"))
    limit = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    assert ("RLIMIT_NPROC" in said) == (limit != resource.RLIM_INFINITY)
    assert "pids.max" in said


def test_the_limits_are_noted_at_the_error_of_a_thread() -> None:
    error, other = RuntimeError("can't start new thread"), RuntimeError("dictionary changed size")
    note_limits(error)
    note_limits(other)
    assert error.__notes__ == [too_many()]
    assert not hasattr(other, "__notes__")


@needs_root
def test_a_manager_says_it() -> None:
    for most in (1, 2):  # the process that is started, and the one that it forks
        said = limited(most, MANAGER)
        assert said.startswith("no server can be started: too many processes: RLIMIT_NPROC, ")


@needs_root
def test_the_private_server_says_it() -> None:
    for most in (1, 2):
        said = limited(most, PARKS)
        assert said.startswith(
            "no private server can be started: too many processes: RLIMIT_NPROC, "
        )
