"""orphan: a child of init that is there when the caller goes on, or the error of fork(2)."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from commandline import FDSHARE, Shell
from users import few_processes, needs_root

from fdshare.cli.support.orphan import fork_orphan


def test_it_is_no_child_of_the_caller() -> None:
    reads, writes = os.pipe()
    me = os.getpid()
    if fork_orphan():
        os.write(writes, f"{os.getppid() != me} {os.getsid(0) != os.getsid(me)}".encode())
        os._exit(0)
    os.close(writes)
    with open(reads) as said:
        assert said.read() == "True True"


def at_the_limit(shell: Shell, most: int, *words: str | Path) -> tuple[int, str, str]:
    """(status, output, error) of a command whose user may have *most* processes."""
    done = subprocess.run(
        [*FDSHARE, *map(str, words)],
        env=shell.environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=few_processes(most),
    )
    return done.returncode, done.stdout, done.stderr


def told(done: tuple[int, str, str], most: int) -> bool:
    status, output, error = done
    limit = f"RLIMIT_NPROC, {most} (ulimit -u), or the pids.max of a cgroup"
    assert (status, output) == (1, ""), done
    assert error == f"fdshare: too many processes: {limit} is reached\n"
    return True


@needs_root
@pytest.mark.parametrize("most", [1, 2])
def test_a_take_is_not_confirmed_where_nobody_can_watch_the_exec(
    fdshare: Shell, until: Callable[..., object], most: int
) -> None:
    """With two processes it ended by SIGPIPE, and said nothing."""
    fdshare("register", "job", "--memory", "/proc/version")
    assert told(at_the_limit(fdshare, most, "take", "job", "--", "echo", "taken"), most)
    until(lambda: not fdshare.json("info", "job")["leased"], "the entry is back")
    assert at_the_limit(fdshare, 3, "take", "job", "--", "echo", "taken") == (0, "taken\n", "")


@needs_root
@pytest.mark.parametrize("most", [1, 2])
def test_no_program_runs_without_the_helper_for_its_notifications(
    fdshare: Shell, most: int
) -> None:
    """With two processes it ran, and its READY=1 and what it stored went nowhere."""
    words = ["run", "--notify", "w=tcp://127.0.0.1:0", "--", "echo", "it runs"]
    assert told(at_the_limit(fdshare, most, *words), most)
    assert at_the_limit(fdshare, 3, *words) == (0, "it runs\n", "")


@needs_root
@pytest.mark.parametrize("most", [1, 2, 3])
def test_no_deploy_without_the_helper(fdshare: Shell, most: int) -> None:
    words = ["deploy", "w=tcp://127.0.0.1:0", "--", "sleep", "60"]
    assert told(at_the_limit(fdshare, most, *words), most)


@needs_root
@pytest.mark.parametrize("most", [1, 2])
def test_a_server_in_the_background(shell: Shell, most: int) -> None:
    assert told(at_the_limit(shell, most, "serve", "--detach"), most)
    assert shell.run("ping").returncode == 69
