"""The demonstration: what fdshare does, with real processes, for somebody who is new to it.

Each line with "ok" was checked: the kernel said so, or the bytes arrived.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import IO, Any, Final

import fdshare
from fdshare.mp.pickling.dill_code import check_code
from fdshare.server.interpreter import fresh_interpreter

__all__ = ["run"]

_SECONDS: Final = 30  # for anything that is waited for
_WORKERS: Final = 3
_REQUESTS: Final = 60
_MOST: Final = 600  # requests until every worker must have answered one


def run(stream: IO[str]) -> int:
    """Writes the demonstration to *stream*; 0 if every step worked, else 1."""
    transcript = _Transcript(stream)
    transcript.title("fdshare: open sockets and files, handed from process to process")
    try:
        with ExitStack() as stack:
            _run_steps(transcript, stack)
    except _NotSeenError as missing:
        transcript.failed(str(missing))
        return 1
    except Exception as error:
        transcript.failed(f"{type(error).__name__}: {error}")
        return 1
    transcript.title("\nAll of it was seen to work.")
    return 0


def _run_steps(transcript: _Transcript, stack: ExitStack) -> None:
    transcript.step(1, "A server that holds open descriptors, at a path")
    manager = stack.enter_context(fdshare.Manager())
    transcript.ok(f"pid {manager.stats().server_pid} answers at {manager.address}")

    transcript.step(2, "A program binds a TCP port, registers it as 'web', and exits")
    port = _bind(transcript, manager)

    transcript.step(
        3, f"{_WORKERS} unrelated programs, which know only the name, fetch it and serve"
    )
    workers = [stack.enter_context(_worker(manager.address)) for _ in range(_WORKERS)]
    _ask(transcript, port, {worker.pid for worker in workers})

    transcript.step(4, "One of them is killed")
    victim = workers.pop()
    victim.kill()
    victim.wait(_SECONDS)
    transcript.ok(f"kill -9 {victim.pid}, and a client that comes straight after:")
    _ask(transcript, port, {worker.pid for worker in workers})

    fdshare.install()
    stack.callback(fdshare.uninstall)
    transcript.step(5, "Accepted connections and a deleted file, through a multiprocessing.Pool")
    _through_multiprocessing(transcript)
    transcript.step(6, "The same through a multiprocess.Pool, in a lambda")
    try:
        check_code(_through_multiprocess.__code__)
    except pickle.PicklingError as error:
        transcript.skipped(str(error))
    else:
        _through_multiprocess(transcript)


# The listener and the programs that serve it


def _bind(transcript: _Transcript, manager: fdshare.Manager) -> int:
    done = subprocess.run(
        fresh_interpreter(__name__, f"_bind_and_exit({manager.address!r})"),
        stdout=subprocess.PIPE,
        text=True,
        timeout=_SECONDS,
        check=True,
        process_group=0,  # Ctrl-C is for this process, which ends the others
    )
    pid, port = map(int, done.stdout.split())
    transcript.ok(f"pid {pid} bound 127.0.0.1:{port}, registered it, and has ended")
    info = manager.info("web")
    _expect(info.descriptors[0].listening, "the kernel says that the socket listens")
    _expect(not os.path.exists(f"/proc/{info.registrant.pid}"), "its registrant has ended")
    transcript.ok("the port is open all the same: the server holds the listener")
    return port


def _bind_and_exit(path: str) -> int:
    with (
        fdshare.connect(path) as rendezvous,
        socket.create_server(("127.0.0.1", 0), backlog=128) as listener,
    ):
        rendezvous.register("web", listener)
        print(os.getpid(), listener.getsockname()[1])
    return 0


@contextmanager
def _worker(path: str) -> Iterator[subprocess.Popen[str]]:
    """A program that serves the listener named 'web'; it ends when its standard input ends."""
    process = subprocess.Popen(
        fresh_interpreter(__name__, f"_serve({path!r})"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    try:
        assert process.stdout is not None
        _expect(process.stdout.readline() == "serving\n", "a worker serves")
        yield process
    finally:
        process.kill()
        process.communicate()


def _serve(path: str) -> int:
    threading.Thread(target=_end_with_input, daemon=True).start()
    with fdshare.connect(path) as rendezvous, rendezvous.fetch("web", timeout=10) as listener:
        print("serving", flush=True)
        while True:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(str(os.getpid()).encode())


def _end_with_input() -> None:
    sys.stdin.read()
    os._exit(0)


def _ask(transcript: _Transcript, port: int, pids: set[int]) -> None:
    """Sends requests until each of *pids* has answered; fails if another process answers."""
    answers: Counter[int] = Counter()
    while sum(answers.values()) < _REQUESTS or (
        set(answers) != pids and sum(answers.values()) < _MOST
    ):
        with socket.create_connection(("127.0.0.1", port), timeout=_SECONDS) as client:
            answers[int(client.recv(20))] += 1
    _expect(set(answers) == pids, f"all of {sorted(pids)} answer, not only {sorted(answers)}")
    who = ", ".join(f"{count} by pid {pid}" for pid, count in sorted(answers.items()))
    transcript.ok(f"{sum(answers.values())} requests, 0 failed: {who}")


# Through pools

# An initializer and its arguments.
_WITHOUT_CTRL_C: Final = signal.signal, (signal.SIGINT, signal.SIG_IGN)


@contextmanager
def _connections(count: int) -> Iterator[tuple[list[socket.socket], list[socket.socket]]]:
    """(accepted, connecting): the ends of *count* connections over TCP."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        address = listener.getsockname()
        clients = [
            stack.enter_context(socket.create_connection(address, _SECONDS)) for _ in range(count)
        ]
        accepted = [stack.enter_context(listener.accept()[0]) for _ in range(count)]
        yield accepted, clients


@contextmanager
def _deleted_file() -> Iterator[IO[str]]:
    with tempfile.NamedTemporaryFile("w+", prefix="fdshare-demo-", encoding="utf-8") as named:
        with open(named.name, "a+", encoding="utf-8") as file:
            os.unlink(named.name)
            yield file
        open(named.name, "w").close()  # for NamedTemporaryFile to remove


def _answer(connection: socket.socket, file: IO[str]) -> int:
    """Runs in a worker of a pool, where both are ordinary objects."""
    with connection, file:
        connection.sendall(f"hello from worker {os.getpid()}".encode())
        file.write(f"worker {os.getpid()} was here\n")
    return os.getpid()


def _through_multiprocessing(transcript: _Transcript) -> None:
    with (
        multiprocessing.Pool(2, *_WITHOUT_CTRL_C) as pool,
        _connections(4) as (accepted, clients),
        _deleted_file() as file,
    ):
        tasks = [(connection, file) for connection in accepted]
        pids = pool.starmap_async(_answer, tasks, chunksize=1).get(_SECONDS)
        _check(transcript, pids, clients, file)


def _through_multiprocess(transcript: _Transcript) -> None:
    import multiprocess

    with (
        multiprocess.Pool(2, *_WITHOUT_CTRL_C) as pool,
        _connections(4) as (accepted, clients),
        _deleted_file() as file,
    ):
        # dill pickles the lambda, and with it the open file that it closes over.
        answers: Any = pool.map_async(lambda connection: _answer(connection, file), accepted, 1)
        _check(transcript, answers.get(_SECONDS), clients, file)


def _check(
    transcript: _Transcript, pids: list[int], clients: list[socket.socket], file: IO[str]
) -> None:
    said = [client.recv(100).decode() for client in clients]
    _expect(said == [f"hello from worker {pid}" for pid in pids], "each client gets its answer")
    transcript.ok(f"{len(said)} connections accepted here, answered by workers {_listed(pids)}")
    file.seek(0)
    lines = sorted(file.read().splitlines())
    _expect(lines == sorted(f"worker {pid} was here" for pid in pids), "the file has each line")
    links = os.fstat(file.fileno()).st_nlink
    _expect(links == 0, "the file has no name any more")
    transcript.ok(f"their {len(lines)} lines are in one open file that has {links} names")


def _listed(pids: list[int]) -> str:
    return " and ".join(map(str, sorted(set(pids))))


# The output


class _NotSeenError(Exception):
    """A step did not do what it should show."""


def _expect(seen: bool, what: str) -> None:
    if not seen:
        raise _NotSeenError(what)


class _Transcript:
    """Lines on a stream; in colour (with rich) if that is a terminal."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._console: Any = None
        if stream.isatty():
            from rich.console import Console

            self._console = Console(file=stream, highlight=False)

    def title(self, text: str) -> None:
        self._show(text, "bold")

    def step(self, number: int, text: str) -> None:
        self._show(f"\n{number}. {text}", "bold cyan")

    def ok(self, text: str) -> None:
        self._show(f"   ok  {text}", "green")

    def skipped(self, text: str) -> None:
        self._show(f"   skipped  {text}", "yellow")

    def failed(self, text: str) -> None:
        self._show(f"   FAILED  {text}", "bold red")

    def _show(self, text: str, style: str) -> None:
        if self._console is not None:
            self._console.print(text, style=style, markup=False, soft_wrap=True)
        else:
            print(text, file=self._stream, flush=True)
