"""demo: what it shows, in colour or not."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys

import lambdas

DEMO = [sys.executable, "-m", "fdshare", "demo"]


def test_a_transcript_of_the_main_job() -> None:
    done = subprocess.run(DEMO, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert "\x1b" not in done.stdout
    for step in range(1, 7):
        assert f"\n{step}. " in done.stdout
    assert done.stdout.count(" requests, 0 failed: ") == 2
    assert done.stdout.count("answered by workers") == 1 + lambdas.works
    assert done.stdout.count("skipped  dill ") == 1 - lambdas.works
    assert done.stdout.endswith("\nAll of it was seen to work.\n")
    assert "FAILED" not in done.stdout


def test_ctrl_c_ends_it_without_a_traceback() -> None:
    """The terminal sends it to each process of the group."""
    with subprocess.Popen(
        DEMO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0
    ) as process:
        assert process.stdout is not None
        while " requests, 0 failed: " not in process.stdout.readline():
            assert process.poll() is None
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "\n")


def test_colour_on_a_terminal() -> None:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color"}
    environment.pop("NO_COLOR", None)
    with subprocess.Popen(
        DEMO, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs, env=environment
    ) as process:
        os.close(theirs)
        seen = b""
        while True:
            try:
                data = os.read(ours, 65536)
            except OSError:  # EIO: the last writer has closed
                break
            if not data:
                break
            seen += data
    os.close(ours)
    assert process.returncode == 0, seen.decode()
    assert b"\x1b[32m   ok  " in seen
    assert b"All of it was seen to work." in seen
