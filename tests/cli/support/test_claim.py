"""Claim: the entry is removed when the program runs, and only then."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from commandline import Shell

# Killed in the moment before its exec, which nobody else could tell from the exec itself.
KILLED = """
import os, signal, sys
from fdshare import connect
from fdshare.cli.support.claim import Claim
descriptors, claim = Claim.of(connect(), "job", 0)
witness = claim.confirm_at_exec()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_who_is_killed_before_the_exec_has_taken_nothing(fdshare: Shell, until) -> None:
    fdshare("register", "job", "--memory", "/proc/version")
    done = subprocess.run([sys.executable, "-c", KILLED], env=fdshare.environment)
    assert done.returncode == -signal.SIGKILL
    until(lambda: not fdshare.json("info", "job")["leased"], "the entry is back")


ALONE = """
import os
try:
    print("a child of its own:", os.waitpid(-1, 0))
except ChildProcessError:
    print(sorted(os.listdir("/proc/self/fd")))
"""


def test_the_program_has_no_child_and_no_descriptor_of_it(fdshare: Shell) -> None:
    fdshare("register", "job", "--memory", "/proc/version")
    said = fdshare("take", "job", "--", sys.executable, "-c", ALONE)
    assert said == "['0', '1', '2', '3', '4']\n"  # 4 is the folder that it lists
    assert fdshare.json("ls") == []


def test_the_program_is_the_process_that_took_it(fdshare: Shell) -> None:
    fdshare("register", "job", "--memory", os.devnull)
    process = fdshare.start("take", "job", "--", "sh", "-c", "echo $$")
    assert process.communicate(timeout=30)[0] == f"{process.pid}\n"
