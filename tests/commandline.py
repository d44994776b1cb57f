"""The command line as a user has it: real processes, their output and exit status."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from nursery import Process

ROOT = Path(__file__).parent.parent
FDSHARE = [sys.executable, "-m", "fdshare"]


class Shell:
    """Runs commands against the server at `path`; everything it started ends with `close`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = str(folder / "s.sock")
        # Programs of the environment that runs the tests come first: fdshare, gunicorn, python.
        programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.environment = {
            **os.environ,
            "FDSHARE_PATH": self.path,
            "PATH": programs,
            "PYTHONPATH": str(ROOT),
            "NO_COLOR": "1",
        }
        for variable in ("COLUMNS", "NOTIFY_SOCKET", "XDG_RUNTIME_DIR", "FDSHARE_AUTHKEY_FILE"):
            self.environment.pop(variable, None)
        self._started: list[subprocess.Popen[str]] = []
        self._strangers: list[int] = []

    def run(
        self, *words: str | Path, env: dict[str, str] | None = None, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """One command, to its end."""
        command = [*FDSHARE, *map(str, words)]
        options.setdefault("stdin", subprocess.DEVNULL)
        options["env"] = {**self.environment, **(env or {})}
        # No pipes: a command may leave a process that has them open.
        with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
            with Process(command, stdout=stdout, stderr=stderr, **options) as process:
                try:
                    status = process.wait(60)
                except subprocess.TimeoutExpired:
                    process.kill()
                    raise
            stdout.seek(0)
            stderr.seek(0)
            return subprocess.CompletedProcess(command, status, stdout.read(), stderr.read())

    def __call__(self, *words: str | Path, status: int = 0, **options: Any) -> str:
        """What a command printed; it must end with *status*, and say nothing unless it failed."""
        done = self.run(*words, **options)
        assert done.returncode == status, (words, done)
        if status == 0:
            assert done.stderr == "", done
        return done.stdout

    def json(self, *words: str | Path, **options: Any) -> Any:
        """What a command printed with --json."""
        return json.loads(self(*words, "--json", **options))

    def fails(self, *words: str | Path, status: int = 1, **options: Any) -> str:
        """The one line with which a command failed."""
        done = self.run(*words, **options)
        assert done.returncode == status, (words, done)
        assert done.stdout == "", done
        (line,) = done.stderr.splitlines()
        return line

    def start(self, *words: str | Path, **options: Any) -> subprocess.Popen[str]:
        """A command in the background."""
        options.setdefault("stdout", subprocess.PIPE)
        env = {**self.environment, **options.pop("env", {})}
        process = Process([*FDSHARE, *map(str, words)], env=env, text=True, **options)
        self._started.append(process)
        return process

    def serve(self, *options: str | Path, **more: Any) -> subprocess.Popen[str]:
        """A server that is ready."""
        reads, writes = os.pipe()
        with open(reads, "rb") as ready:
            try:
                process = self.start(
                    "serve",
                    "--ready-fd",
                    str(writes),
                    "--log-level",
                    "warning",
                    *options,
                    pass_fds=[writes],
                    **more,
                )
            finally:
                os.close(writes)
            assert ready.read() == b"\n", "the server did not start"
        return process

    def adopt(self, pid: int) -> None:
        """*pid*, which a command left running, ends with `close`."""
        self._strangers.append(pid)

    def close(self) -> None:
        # A killed keeper would be replaced by its server: ask it to end, before it is made to.
        for process in self._started:
            process.terminate()
        for process in self._started:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    stream.close()
        for pid in self._strangers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if os.path.exists(self.path):
            self.run("stop")  # one that was started by a command
