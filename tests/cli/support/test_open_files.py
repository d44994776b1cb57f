"""Who has a descriptor open: kcmp(2) and /proc."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from fdshare.cli.support.open_files import holders, same_open_file

HOLD = "import sys; print('up', flush=True); sys.stdin.read()"


def test_the_same_open_file_is_told_from_the_same_file() -> None:
    here = os.getpid()
    with open("/dev/null", "rb") as one, open("/dev/null", "rb") as other:
        copy = os.dup(one.fileno())
        try:
            if same_open_file(here, 0, here, 0) is None:
                pytest.skip("kcmp is not allowed here")
            assert same_open_file(here, one.fileno(), here, copy) is True
            assert same_open_file(here, one.fileno(), here, other.fileno()) is False
        finally:
            os.close(copy)
        assert same_open_file(here, one.fileno(), here, 999999) is False


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
