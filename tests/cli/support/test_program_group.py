"""end_group: the whole group ends, with SIGKILL if it must."""

from __future__ import annotations

import os
import subprocess
import sys

from fdshare.cli.support.program_group import end_group
from fdshare.kernel.descriptor import Descriptor

# A child that ignores SIGTERM, and outlives its leader.
STUBBORN = """
import os, select, signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork():
    print(os.getpid(), flush=True)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
select.select([], [], [])
"""


def test_a_zombie_is_not_waited_for() -> None:
    """As in a container whose pid 1 reaps nobody."""
    with (
        subprocess.Popen(
            [sys.executable, "-c", "import os; os._exit(0)"], start_new_session=True
        ) as process,
        Descriptor(os.pidfd_open(process.pid)) as leader,
    ):
        os.waitid(os.P_PIDFD, leader.fileno(), os.WEXITED | os.WNOWAIT)
        end_group(leader, process.pid, float("inf"), own=False)


def test_what_ignores_sigterm_is_killed() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", STUBBORN],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with Descriptor(os.pidfd_open(process.pid)) as leader:
            end_group(leader, process.pid, 0.1, own=True)
            # It returns when nobody is left: both had the pipe.
            assert process.stdout.read() == ""
            end_group(leader, process.pid, 0.1, own=False)
