"""How an old version ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fdshare.cli.support.deployment import ProgramStart, Version
from fdshare.cli.support.old_version import PRESETS, Ending, catches, paths_kept
from fdshare.kernel.descriptor import Descriptor

# Tells the signals that come; SIGTERM ends it unless it is to be stubborn.
TELL = """
import os, signal, sys
def tell(number, frame):
    os.write(1, signal.Signals(number).name.encode() + b"\\n")  # in a print(), too
    if number == signal.SIGTERM and len(sys.argv) == 1:
        sys.exit()
for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGQUIT):
    signal.signal(number, tell)
print("up", flush=True)
while True:
    signal.pause()
"""
START = ProgramStart([b"web"], [b"x"], b"/", {})


@contextmanager
def running(*words: str) -> Iterator[tuple[Version, subprocess.Popen[str]]]:
    with subprocess.Popen(
        [sys.executable, "-c", TELL, *words],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        version = Version(process.pid, Descriptor(os.pidfd_open(process.pid)), START, "")
        yield version, process
        version.close()


def test_it_is_drained_and_stopped() -> None:
    steps: list[str] = []
    with running() as (old, process):
        ending = Ending(drain_signal=signal.SIGUSR1, drain_time=0.3)
        assert ending.end(old, steps.append) == ""
        assert process.stdout is not None
        assert process.stdout.read() == "SIGUSR1\nSIGTERM\n"
        assert old.has_ended()
    assert set(steps) <= {"the old version answers what it has", "the old version stops"}
    assert steps


def test_a_signal_that_it_does_not_handle_is_not_sent() -> None:
    with running() as (old, process):
        assert not catches(process.pid, signal.SIGUSR2)
        assert catches(process.pid, signal.SIGUSR1)
        said = Ending(drain_signal=signal.SIGUSR2).end(old, lambda text: None)
        assert "does not handle SIGUSR2" in said
        assert process.wait(30) == 0


def test_what_does_not_stop_is_killed() -> None:
    with running("stubborn") as (old, process):
        said = Ending(stop_timeout=0.1).end(old, lambda text: None)
        assert "did not stop within 0.1 s: it is killed" in said
        assert process.wait(30) == -signal.SIGKILL


def test_presets_are_of_programs_that_need_draining() -> None:
    assert {ending.drain_signal for ending in PRESETS.values()} == {signal.SIGUSR1}


def test_a_path_that_is_removed_comes_back(folder: Path) -> None:
    path = folder / "s"
    with socket.socket(socket.AF_UNIX) as listener, socket.create_server(("127.0.0.1", 0)) as other:
        listener.bind(str(path))
        listener.listen()
        inode = path.stat().st_ino
        held = [Descriptor.dup_of(listener), Descriptor.dup_of(other)]
        with held[0], held[1]:
            with paths_kept(held):
                path.unlink()
            assert path.stat().st_ino == inode
            with paths_kept(held):
                pass
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(path))
    assert os.listdir(folder) == ["s"]
