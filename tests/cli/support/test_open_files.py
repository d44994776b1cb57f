"""Who has a descriptor open: kcmp(2) and /proc."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

from fdshare.cli.support.open_files import holders

HOLD = "import sys; print('up', flush=True); sys.stdin.read()"


def test_every_process_that_holds_it_is_found() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        number = listener.fileno()
        command = [sys.executable, "-c", HOLD]
        with subprocess.Popen(
            command, pass_fds=[number], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            (found,) = holders([number])
            assert (found.pid, found.uid, found.fds) == (process.pid, os.geteuid(), [number])
            assert found.command.startswith(sys.executable)
            process.communicate()
        assert holders([number]) == []
