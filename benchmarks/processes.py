"""The processes that a benchmark runs beside its own: peers in C and Python, and their answers."""

from __future__ import annotations

import array
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter_ns
from typing import Any

from benchmarks.measure import NotHere, Run, middle
from fdshare import Client, connect

__all__ = [
    "ALIKE",
    "HERE",
    "bare_python",
    "c_pingpong",
    "compiled",
    "cpu_seconds",
    "fdshare_serve",
    "held_file",
    "in_child",
    "quiet",
    "s6",
    "same_file",
]

HERE = Path(__file__).parent
# The bytes of a fetch of "web/http" and of its answer, so that the floor moves as many.
ALIKE = (31, 61)
_CLOEXEC = int(socket.MSG_CMSG_CLOEXEC)


def compiled(source: str, folder: Path, *libraries: str) -> str:
    """The path of peers/*source*.c, compiled. Raises: NotHere."""
    compiler = shutil.which("cc")
    if compiler is None:
        raise NotHere("not installed: a C compiler (Debian: gcc)")
    target = folder / source
    command = [compiler, "-O2", "-o", str(target), str(HERE / "peers" / f"{source}.c"), *libraries]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise NotHere(f"does not compile here: {done.stderr.strip().splitlines()[0]}")
    return str(target)


@contextmanager
def held_file() -> Iterator[int]:
    """A descriptor to send: a memfd of its own, so that the receiver can identify it."""
    fd = os.memfd_create("benchmark")
    try:
        yield fd
    finally:
        os.close(fd)


def same_file(one: int, other: int) -> bool:
    """Whether two descriptors are of the same file."""
    return os.path.samestat(os.fstat(one), os.fstat(other))


class Told:
    """A child that reads commands as lines. It answers with nanoseconds: as in `each`, so many
    times the median of one."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def ask(self, line: str) -> list[int]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self._process.args!r} ended at {line!r}")
        return [int(word) for word in answer.split()]

    def run(self, verb: str = "") -> Run:
        """A side in which the child does *verb*."""
        return lambda count: self.ask(f"{verb} {count}".strip())[0] / 1e9


@contextmanager
def told(command: Sequence[str], fds: Sequence[int]) -> Iterator[Told]:
    process = subprocess.Popen(
        command, pass_fds=fds, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        try:
            yield Told(process)
        finally:
            process.stdin.close()  # type: ignore[union-attr]


@contextmanager
def c_pingpong(folder: Path, fd: int, sizes: tuple[int, int] = ALIKE) -> Iterator[Run]:
    """The floor in C. Raises: NotHere."""
    program = compiled("pingpong", folder)
    with told([program, str(fd), *map(str, sizes)], [fd]) as child:
        yield child.run()


@contextmanager
def bare_python(
    mode: str, fd: int, sizes: tuple[int, int] = ALIKE, copies: int = 1
) -> Iterator[Run]:
    """The floor in Python: this half is a loop of sendmsg, recvmsg and close, and no more."""
    ours, theirs = socket.socketpair()
    program = str(HERE / "peers" / "pingpong.py")
    numbers = map(str, (theirs.fileno(), fd, sizes[1], copies))
    words = [sys.executable, "-S", program, mode, *numbers]
    room = socket.CMSG_SPACE(copies * array.array("i").itemsize)
    with ours, subprocess.Popen(words, pass_fds=[theirs.fileno(), fd]) as process:
        theirs.close()
        request = [b"name" + bytes(sizes[0] - 4)]

        def run(count: int) -> float:
            took = []
            for _ in range(count):
                start = perf_counter_ns()
                ours.sendmsg(request)
                _, control, _, _ = ours.recvmsg(65536, room, _CLOEXEC)
                for descriptor in array.array("i", control[0][2]):
                    os.close(descriptor)
                took.append(perf_counter_ns() - start)
            ours.sendmsg(request)
            got = array.array("i", ours.recvmsg(65536, room, _CLOEXEC)[1][0][2])
            assert len(got) == copies
            for descriptor in got:
                assert same_file(descriptor, fd), "another descriptor arrived"
                os.close(descriptor)
            return middle(took)

        try:
            yield run
        finally:
            ours.close()
            process.wait()


@contextmanager
def s6(folder: Path, fd: int) -> Iterator[Told]:
    """A client on a connection to an s6-fdholderd that lets it do everything. Raises: NotHere."""
    daemon = shutil.which("s6-fdholder-daemon")
    if daemon is None:
        raise NotHere("not installed: s6 (Debian: s6, libs6-dev, skalibs-dev)")
    program = compiled("s6client", folder, "-ls6", "-lskarnet")
    rules, path = folder / "rules" / "uid" / "default", str(folder / "s6.sock")
    (rules / "env").mkdir(parents=True)
    (rules / "allow").touch()
    for right, value in (("STORE_REGEX", ".*"), ("RETRIEVE_REGEX", ".*"), ("LIST", "1")):
        (rules / "env" / f"S6_FDHOLDER_{right}").write_text(value)
    words = [daemon, "-1", "-c", "100", "-n", "15000", "-i", str(folder / "rules"), path]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            if not process.stdout.readline():
                raise NotHere("s6-fdholder-daemon does not start here")
            with told([program, path, str(fd)], [fd]) as child:
                yield child
        finally:
            process.terminate()
            process.wait()


@contextmanager
def fdshare_serve(folder: Path, *options: str) -> Iterator[Client]:
    """A client of an `fdshare serve` that logs into a file, its path and ".log"."""
    reads, writes = os.pipe()
    path = str(folder / "-".join(("s", *options)))
    words = [sys.executable, "-m", "fdshare", "serve", path, "--ready-fd", str(writes), *options]
    with open(f"{path}.log", "ab") as log, open(reads, "rb") as ready:
        process = subprocess.Popen(words, pass_fds=[writes], stderr=log)
        os.close(writes)
        assert ready.read(1) == b"\n"
    try:
        with connect(path) as client:
            yield client
    finally:
        process.terminate()
        process.wait()


@contextmanager
def quiet() -> Iterator[None]:
    """Processes that are started inside have /dev/null as standard error."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def cpu_seconds(pid: int) -> float:
    """The processor time of *pid*, user and system, in nanoseconds, as the scheduler counts it.

    It is the sum over all threads of the process.
    """
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        total += int((task / "schedstat").read_text().split()[0])
    return total / 1e9


@contextmanager
def in_child(side: Callable[[], AbstractContextManager[Run]]) -> Iterator[Run]:
    """A side that is measured in a forked process of its own, which shares no threads, children and
    changed picklers with others. What it is called with is passed on."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=_obey, args=(theirs, ours, side))
    process.start()
    theirs.close()

    def run(*order: Any) -> float:
        try:
            ours.send(order)
            took: float = ours.recv()
        except (EOFError, BrokenPipeError):
            raise RuntimeError("the process of a side has failed, see above") from None
        return took

    try:
        yield run
    finally:
        ours.close()
        process.join()


def _obey(orders: Connection, others: Connection, side: Callable[[], Any]) -> None:
    others.close()
    with side() as run:
        while True:
            try:
                order = orders.recv()
            except EOFError:
                return
            orders.send(run(*order))
