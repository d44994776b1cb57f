"""Commands of fdshare as processes that are forked, not started, which takes a tenth of the time.

Run as a program it imports the command line once, and forks a process for every command that it is
sent, with descriptors 0, 1 and 2 of its own: the process that `python -m fdshare` is after its
imports. `Shell.start`, and `Shell.run` with options, start real ones.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pkgutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn

_LONGEST = 1 << 17  # bytes of a command with its environment


class Nursery:
    """Forks commands, one at a time."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())], pass_fds=[theirs.fileno()]
            )
        self._socket = ours

    def run(
        self, words: list[str], env: dict[str, str], timeout: float
    ) -> subprocess.CompletedProcess[str]:
        """A command with nothing on standard input, to its end."""
        with (
            open(os.devnull, "rb") as stdin,
            tempfile.TemporaryFile("w+") as stdout,
            tempfile.TemporaryFile("w+") as stderr,
        ):
            asked = json.dumps({"words": words, "env": env, "cwd": os.getcwd()}).encode()
            fds = [stdin.fileno(), stdout.fileno(), stderr.fileno()]
            socket.send_fds(self._socket, [asked], fds)
            self._socket.settimeout(timeout)
            status = os.waitstatus_to_exitcode(int(self._socket.recv(64)))
            stdout.seek(0)
            stderr.seek(0)
            return subprocess.CompletedProcess(words, status, stdout.read(), stderr.read())

    def close(self) -> None:
        self._socket.close()
        self._process.wait()


def nurse(number: int) -> None:
    """Forks what is asked for, until the other end is closed."""
    sys.path.insert(0, str(Path(__file__).parent.parent))
    cli = importlib.import_module("fdshare.cli")
    for module in pkgutil.iter_modules(cli.__path__, "fdshare.cli."):
        importlib.import_module(module.name)
    for name in ("rich.console", "rich.table", "rich.live", "rich.text", "fdshare.manager"):
        importlib.import_module(name)
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's is for pytest
    with socket.socket(fileno=number) as asking:
        asking.set_inheritable(False)
        while True:
            data, fds, _, _ = socket.recv_fds(asking, _LONGEST, 3)
            if not data:
                return
            pid = os.fork()
            if not pid:
                asking.close()
                signal.signal(signal.SIGINT, interrupt)
                command(json.loads(data), fds)
            for fd in fds:
                os.close(fd)
            with contextlib.suppress(BrokenPipeError):
                asking.send(b"%d" % os.waitpid(pid, 0)[1])


def command(asked: dict[str, Any], fds: list[int]) -> NoReturn:
    """This process is the command from here on."""
    for number, fd in enumerate(fds):
        os.dup2(fd, number)
        os.close(fd)
    os.environ.clear()
    os.environ.update(asked["env"])
    os.chdir(asked["cwd"])
    sys.argv = ["fdshare", *asked["words"]]
    from fdshare.__main__ import main

    sys.exit(main())


if __name__ == "__main__":
    nurse(int(sys.argv[1]))
