"""Processes: what is pickled on the way, and what becomes of a start that fails."""

from __future__ import annotations

import gc
import importlib
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from crowding import run_crowded
from users import needs_root

from fdshare import get_context
from mp import children
from mp.common import METHODS, PACKAGES, finish, identity, open_now, trackers  # noqa: F401
from mp.workers.test_worker_handler import BEGINS


@pytest.fixture(params=PACKAGES)
def package(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("method", METHODS)
def test_arguments_larger_than_the_pipe(package: str, method: str) -> None:
    ctx = get_context(method, backend=package)
    queue = ctx.SimpleQueue()
    with socket.socket() as sock:
        process = ctx.Process(target=_measure, args=(queue, b"x" * (1 << 22), sock))
        process.start()
        assert queue.get() == (1 << 22, identity(sock))
        process.join()
    finish(queue)


def _measure(queue: Any, data: bytes, sock: socket.socket) -> None:
    queue.put((len(data), children.identity(sock)))


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_what_cannot_be_pickled_is_raised_by_start(package: str, method: str) -> None:
    ctx = get_context(method, backend=package)
    with socket.socket() as sock:
        process = ctx.Process(target=print, args=(sock, children.Unpicklable()))
        gc.collect()
        before = open_now()
        with pytest.raises(AttributeError, match="not to be pickled"):
            process.start()
        assert open_now() == before


# Calls of workers that have no descriptor left.
AT_THE_LIMIT = """\
import os, resource, sys
from fdshare import ProcessPoolExecutor, get_context

def fill():
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    try:
        while True:
            os.open(os.devnull, os.O_RDONLY)
    except OSError:
        pass

def fails():
    raise ValueError("as it was raised")

def main(package, method):
    context = get_context(method, backend=package)
    with context.Pool(1) as pool, ProcessPoolExecutor(1, context) as executor:
        for call in pool.apply, lambda function: executor.submit(function).result():
            call(fill)
            try:
                call(fails)
            except ValueError as error:
                print(error, "in fails" in str(error.__cause__))
"""
lazy = pytest.mark.skipif(sys.version_info < (3, 15), reason="no lazy imports before Python 3.15")


@pytest.mark.parametrize("imports", ["normal", pytest.param("all", marks=lazy)])
@pytest.mark.parametrize("method", METHODS)
def test_a_worker_without_descriptors_says_what_was_raised(
    package: str, method: str, imports: str, tmp_path: Path
) -> None:
    (tmp_path / "at_the_limit.py").write_text(AT_THE_LIMIT)
    code = f"import at_the_limit; at_the_limit.main({package!r}, {method!r})"
    root = Path(__file__).parents[3]
    said = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={
            **os.environ,
            "PYTHONPATH": f"{tmp_path}{os.pathsep}{root}",
            "PYTHON_LAZY_IMPORTS": imports,
        },
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (said.stdout, said.stderr) == ("as it was raised True\n" * 2, "")


def test_a_child_that_ends_before_it_has_its_arguments(package: str, tmp_path: Path) -> None:
    program = tmp_path / "ends.py"
    program.write_text(
        "import os, sys\n"
        "if __name__ != '__main__': os._exit(5)\n"
        "import fdshare\n"
        f"process = fdshare.get_context('spawn', backend={package!r}).Process(\n"
        "    target=print, args=(b'x' * (1 << 22),))\n"
        "try: process.start()\n"
        "except OSError: print('raised')\n"
        "own = f'/proc/self/task/{os.getpid()}/children'\n"
        "for pid in open(own).read().split():\n"
        "    print(open(f'/proc/{pid}/cmdline').read() and 'alive' or 'zombie')\n"
    )
    done = subprocess.run(
        [sys.executable, str(program)], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == ["raised", "alive"]  # the resource tracker


class Subclass(get_context("spawn").Process):  # type: ignore[misc]
    def __init__(self, queue: Any, sock: socket.socket) -> None:
        super().__init__()
        self.queue = queue
        self.sock = sock

    def run(self) -> None:
        with self.sock:
            self.queue.put(os.fstat(self.sock.fileno()).st_ino)


def test_a_subclass_of_process() -> None:
    queue = get_context("spawn").SimpleQueue()
    with socket.socket() as sock:
        process = Subclass(queue, sock)
        process.start()
        assert queue.get() == identity(sock)[1]
        process.join()
        assert process.exitcode == 0
        process.sock = None  # type: ignore[assignment]
    finish(queue)


@pytest.mark.parametrize("method", METHODS)
def test_a_child_starts_children_of_its_own(method: str) -> None:
    ctx = get_context(method)
    queue = ctx.SimpleQueue()
    with socket.socket() as sock:
        process = ctx.Process(target=_start_another, args=(method, queue, sock))
        process.start()
        assert queue.get() == identity(sock)
        process.join()
    finish(queue)


def _start_another(method: str, queue: Any, sock: socket.socket) -> None:
    process = get_context(method).Process(target=children.answer, args=(queue, sock))
    process.start()
    process.join()


# What the stock method does, beside fork(2): ours does the same.
KNOWN = {
    *("os", "pipe", "fork", "pid", "close", "_bootstrap", "_exit", "sentinel"),
    *("util", "Finalize", "close_fds", "finalizer"),
    *("atexit", "_clear", "register", "_exit_function", "_run_exitfuncs"),  # 3.13
    *("resource_tracker", "_fork_intent", "preserve_fd"),  # 3.14
}


def test_the_stock_method_does_nothing_else(package: str) -> None:
    launch = importlib.import_module(f"{package}.popen_fork").Popen._launch
    assert set(launch.__code__.co_names) <= KNOWN


RAISES = """
from mp.common import open_now
process = ctx.Process(target=print)
before = open_now()
with crowd:
    try:
        process.start()
    except (OSError, EOFError) as error:
        print(type(error).__name__, error)
print(open_now() - before)
process.start()
process.join()
"""


@needs_root
@pytest.mark.parametrize("method", METHODS)
def test_a_start_where_no_process_can_be_started(package: str, method: str) -> None:
    """Under fork it left four descriptors open."""
    output, _ = run_crowded(BEGINS + RAISES, method, package)
    name, _, rest = output.partition(" ")
    limits = (
        "too many processes: RLIMIT_NPROC, 1 (ulimit -u), or the pids.max of a cgroup is reached"
    )
    if method == "forkserver":
        assert name == "EOFError"
        why = f"the fork server died before it started the process; perhaps {limits}"
        assert rest == f"{why}\n0\n\n"
    else:
        assert name == "BlockingIOError"
        assert rest == f"[Errno 11] {limits}\n0\n\n"
