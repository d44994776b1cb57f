"""A machine for one page: processes, network, /run and /etc of its own, and a shell that stays."""

from __future__ import annotations

import os
import select
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from commandline import ROOT

# Its first process is bash, whose end is the end of every process in it.
_UNSHARE = ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
_SECONDS = 60.0

# What a page may change is a copy. Pages become other users: a home that others may not enter, with
# the interpreter in it, is replaced by one with the interpreter and the project alone.
_MACHINE = """
set -e
mount -t tmpfs -o mode=755 tmpfs /run
cp -a /etc /run/.etc 2>/dev/null || [ -s /run/.etc/passwd ]  # not all of it, without root
mount --bind /run/.etc /etc
for place in /srv /var/log; do mount -t tmpfs -o mode=755 tmpfs $place; done
if [ -n "$CLOSED" ]; then
  mkdir /run/.home
  mount --bind "$CLOSED" /run/.home
  mount -t tmpfs -o mode=755 tmpfs "$CLOSED"
  for place in $INNER; do
    mkdir -p "$CLOSED/$place"
    mount --bind "/run/.home/$place" "$CLOSED/$place"
  done
  umount /run/.home
fi
ip link set lo up
unset CLOSED INNER
set +e
"""
# Each command is a file: its output goes into another, its status to descriptor 9.
_LOOP = """
echo 0 >&9
while read -r command; do . "$command" >"$command.out" 2>&1 9>&- </dev/null; echo $? >&9; done
"""


class Machine:
    """Runs commands one after the other, in one shell; everything ends with `close`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._transcripts = folder / ".transcripts"
        self._transcripts.mkdir()
        self._count = 0
        self._seen: dict[int, int] = {}  # characters of what each command has printed
        folder.chmod(0o755)
        reads, writes = os.pipe()
        script = f"exec 9>&{writes} {writes}>&-\n{_MACHINE}{_LOOP}"
        with open(writes, "wb"):
            self._shell = subprocess.Popen(
                [*_UNSHARE, *_MAPPED, "bash", "--noprofile", "--norc", "-c", script],
                stdin=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=folder,
                env=self._environment(),
                pass_fds=[writes],
                text=True,
            )
        self._status = open(reads)
        if self._answer() != "0":
            assert self._shell.stderr is not None
            self._shell.wait(10)
            said = self._shell.stderr.read()
            self.close()
            pytest.skip(f"no namespaces for a page here: {said}")

    def run(self, text: str, seconds: float = _SECONDS) -> tuple[int, str]:
        """What the command in *text* ended with, and what it printed."""
        self._count += 1
        command = self._transcripts / str(self._count)
        command.write_text(f"{text}\n")
        assert self._shell.stdin is not None
        self._shell.stdin.write(f"{command}\n")
        self._shell.stdin.flush()
        status = self._answer(seconds)
        said = command.with_name(f"{command.name}.out").read_text()
        assert status, f"not within {seconds} s: {text}\n{said}"
        return int(status), said

    def news(self) -> str:
        """What all commands have printed since this was called last, with those that go on."""
        news = []
        for number in range(1, self._count + 1):
            text = (self._transcripts / f"{number}.out").read_text()
            news.append(text[self._seen.get(number, 0) :])
            self._seen[number] = len(text)
        return "".join(news)

    def close(self) -> None:
        self._shell.kill()  # and with it, its child, and with that, all
        self._shell.wait()
        for stream in (self._shell.stdin, self._shell.stderr, self._status):
            assert stream is not None
            try:
                stream.close()
            except BrokenPipeError:
                pass

    def _answer(self, seconds: float = _SECONDS) -> str:
        """The next status; empty if there is none in time, or no shell."""
        if not select.select([self._status], [], [], seconds)[0]:
            return ""
        return self._status.readline().strip()

    def _environment(self) -> dict[str, str]:
        programs = [str(Path(__file__).parent / "bin"), str(Path(sys.executable).parent)]
        closed, inner = _closed()
        return {
            "PATH": os.pathsep.join([*programs, os.environ["PATH"], "/usr/sbin", "/sbin"]),
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "HOME": str(self.folder),
            "USER": "root",
            "LANG": "C.UTF-8",
            "EXAMPLES": str(ROOT / "examples"),
            "CLOSED": closed,
            "INNER": inner,
        }


def _closed() -> tuple[str, str]:
    """The folder that keeps others from the interpreter, and what in it they need; or empty."""
    for folder in reversed(Path(sys.base_prefix).parents):
        if not _may_enter(folder):
            inside = [str(p.relative_to(folder)) for p in _NEEDED if p.is_relative_to(folder)]
            return str(folder), " ".join(inside)
    return "", ""


def others_may_run() -> bool:
    """Whether other users reach the interpreter, its modules and the project in a Machine."""
    closed, _ = _closed()
    for place in _NEEDED:
        inside = closed and place.is_relative_to(closed)
        if not all(map(_may_enter, [place, *(() if inside else place.parents)])):
            return False
    return True


def _may_enter(folder: Path) -> bool:
    return bool(folder.stat().st_mode & stat.S_IXOTH)


_NEEDED = {Path(place) for place in (sys.base_prefix, sys.prefix, ROOT)}


_MAPPED = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]


@contextmanager
def machine_in(folder: Path) -> Iterator[Machine]:
    """A machine whose commands begin in *folder*. Skips a test where there are none."""
    for program in ("unshare", "ip", "bash"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed (Debian: util-linux, iproute2, bash)")
    machine = Machine(folder)
    try:
        yield machine
    finally:
        machine.close()
