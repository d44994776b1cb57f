"""What holds for every test: the same descriptors after it as before, no process left behind."""

from __future__ import annotations

import atexit
import faulthandler
import gc
import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import bytecode
import nursery
import pytest
from barepeer import Peer
from hypothesis import settings
from nursery import Manager

from fdshare.client.blocking.client import Client

T = TypeVar("T")

STDERR = pytest.StashKey[int]()

# No test measures time: not even how long one example takes.
settings.register_profile("fdshare", deadline=None)
settings.load_profile("fdshare")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[STDERR] = os.dup(2)  # later it is captured
    # A shell, or nohup, has started it in the background: programs of tests would ignore it, too.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if not hasattr(config, "workerinput"):
        bytecode.compile_all()
        _use_temporary_directory()


def _use_temporary_directory() -> None:
    """Gives all programs of the tests one directory for temporary files, and removes it at the end:
    those that are killed leave some. What pytest itself keeps of the last runs, it keeps."""
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
    path = Path(tempfile.mkdtemp(prefix="fdshare-"))
    path.chmod(0o1777)  # as that of the system: some programs have another uid
    os.environ["TMPDIR"] = str(path)
    tempfile.tempdir = None  # it is read again
    here = os.getpid()

    @atexit.register  # before multiprocessing does: it removes its own first
    def remove() -> None:
        if os.getpid() == here:
            shutil.rmtree(path, ignore_errors=True)


def pytest_collection(session: pytest.Session) -> None:
    bytecode.import_share(session)


def pytest_collection_finish() -> None:
    """What has been imported by now stays: the collector need not look at it again and again, nor
    make copies of its pages in every process that a test forks."""
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Ends the process, after a traceback of each thread, if a test goes on long after its timeout:
    pytest-timeout raises once, and a thread that is joined in a `finally` may never end. xdist
    reports the test as failed and goes on with another process."""
    marker = item.get_closest_marker("timeout")
    seconds = float(marker.args[0] if marker else item.config.getini("timeout"))
    faulthandler.dump_traceback_later(seconds + 60, exit=True, file=item.config.stash[STDERR])
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Who has no tests left takes some of another's: they last from a millisecond to half a
    minute. (As --dist worksteal, where nothing else is asked for.)"""
    if config.getoption("dist") != "load":
        return None
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


def census(pid: int | str = "self") -> dict[int, str]:
    """What /proc says that *pid* has open: number -> target. The listing's own is left out."""
    table = {}
    for number in os.listdir(f"/proc/{pid}/fd"):
        try:
            table[int(number)] = os.readlink(f"/proc/{pid}/fd/{number}")
        except FileNotFoundError:
            continue
    return table


def differences(before: dict[int, str], after: dict[int, str]) -> str:
    """What a census has that another has not, as text; empty where they are equal."""
    left = {fd: target for fd, target in after.items() if before.get(fd) != target}
    gone = {fd: target for fd, target in before.items() if after.get(fd) != target}
    return f"left open: {left}; closed or replaced: {gone}" if left or gone else ""


@pytest.fixture(autouse=True)
def descriptors_compared() -> Iterator[None]:
    """Fails a test after which this process has not the very descriptors that it had before."""
    # What a test leaves in cycles is young; a look at everything, twice a test, would be most of
    # what the suite costs.
    gc.collect(1)
    before = census()
    yield
    gc.collect(1)
    # What another thread is about to close gets a moment; a leak stays.
    deadline = time.monotonic() + 2
    while (wrong := differences(before, census())) and time.monotonic() < deadline:
        gc.collect()
    assert not wrong, f"descriptors {wrong}"


@pytest.fixture(scope="session", autouse=True)
def forks() -> None:
    """What forks servers and commands is there before a test's descriptors are compared."""
    nursery.nursery()


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starts what the test starts as users start it: each process a fresh interpreter."""
    monkeypatch.setattr(nursery, "fresh", True)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short path: pytest's own are longer than sun_path."""
    path = Path(tempfile.mkdtemp(prefix="fds-", dir=os.environ["PYTEST_DEBUG_TEMPROOT"]))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two sockets that are connected to one another."""
    near, far = socket.socketpair()
    with near, far:
        yield near, far


@pytest.fixture
def no_sigpipe() -> Iterator[None]:
    """Fails a test in which this process gets SIGPIPE: where a program has it end it, it would."""
    got: list[int] = []
    former = signal.signal(signal.SIGPIPE, lambda number, _: got.append(number))
    yield
    signal.signal(signal.SIGPIPE, former)
    assert not got


@pytest.fixture
def signalled() -> Iterator[None]:
    """This thread gets a signal that has a handler every 20 ms; after 10 s of them the test fails,
    whatever it waits for."""
    count, done, me = itertools.count(), threading.Event(), threading.get_ident()

    def handle(*_: object) -> None:
        if next(count) == 500:
            pytest.fail("it waits again after each signal")

    def send() -> None:
        while not done.wait(0.02):
            signal.pthread_kill(me, signal.SIGUSR1)

    former = signal.signal(signal.SIGUSR1, handle)
    thread = threading.Thread(target=send)
    thread.start()
    yield
    done.set()
    thread.join()
    signal.signal(signal.SIGUSR1, former)


@pytest.fixture
def null() -> Iterator[int]:
    """A descriptor of /dev/null."""
    fd = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    yield fd
    os.close(fd)


def wait_until(condition: Callable[[], T], what: str = "the condition", seconds: float = 20) -> T:
    """The first true result of *condition*; fails the test after *seconds*.

    The only place of the suite where time passes by itself: what another process or the kernel
    does at its own pace is asked for again and again.
    """
    started = time.monotonic()
    while True:
        result = condition()
        if result:
            return result
        waited = time.monotonic() - started
        assert waited < seconds, f"not within {seconds} s: {what}"
        time.sleep(min(max(0.002, waited / 20), 0.02))  # the processor is for what is waited for


@pytest.fixture
def until() -> Callable[..., Any]:
    """`wait_until`, for tests whose folder has a conftest of its own."""
    return wait_until


class Watched:
    """A server process whose descriptors can be accounted for: it holds what its registry says."""

    def __init__(self, manager: Manager) -> None:
        self.manager = manager
        self.address = manager.address
        with Client(self.address, **self._key()) as admin:
            stats = admin.stats()
            self.pid, self._alone = stats.server_pid, stats.keeper_pid is None
            greeted = census(self.pid)
        # Its log, listener, lock, poller, and what the interpreter has open.
        self.fixed = wait_until(lambda: self._without_one(greeted), "the connection's end")

    def _without_one(self, before: dict[int, str]) -> dict[int, str] | None:
        """Its census when one connection less is open than *before*; None until then."""
        now = census(self.pid)
        return now if now.items() < before.items() and len(now) == len(before) - 1 else None

    def _key(self) -> dict[str, Any]:
        return {"authkey": self.manager._settings.authkey, "trust": self.manager._trust}

    def wrong(self, admin: Client) -> str:
        """What it has open and should not, or has not and should, as text; empty where all is as
        it should be."""
        stats, now = admin.stats(), census(self.pid)
        excess = len(now) - len(self.fixed) - stats.descriptors - stats.connections
        changed = self.fixed.items() - now.items()
        if excess or (changed and self._alone):  # a new keeper has a new journal
            return f"{excess} descriptors too many, changed are {changed}: {now}, {stats}"
        return ""

    def check(self) -> None:
        """Fails unless it holds exactly what its registry says, soon: a thread closes."""
        with Client(self.address, **self._key()) as admin:
            try:
                wait_until(lambda: not self.wrong(admin), "the server's census", 5)
            except AssertionError:
                entries = [(e.name, e.count, e.lifetime, e.leased) for e in admin.infos()]
                raise AssertionError(f"the server has {self.wrong(admin)}, {entries}") from None

    def empty(self) -> None:
        """Unregisters everything."""
        with Client(self.address, **self._key()) as admin:
            for name in admin.names():
                admin.unregister(name)

    def alive(self) -> bool:
        process = self.manager._process
        return process is not None and process.poll() is None


@pytest.fixture(scope="module")
def module_server() -> Iterator[Watched]:
    """One server, without a keeper, for all tests of a module; use `server`, which checks it."""
    with Manager(keeper=False) as manager:
        yield Watched(manager)


@pytest.fixture
def server(module_server: Watched) -> Iterator[Watched]:
    """A server that is empty before and after, and holds exactly what its registry says."""
    yield module_server
    assert module_server.alive(), "the test ended the server"
    module_server.check()
    module_server.empty()
    module_server.check()


@pytest.fixture
def client(server: Watched) -> Iterator[Client]:
    """A client of `server`."""
    with Client(server.address) as client:
        yield client


@pytest.fixture
def serve(folder: Path) -> Iterator[Callable[..., Manager]]:
    """Starts servers of the test's own, with options of `Manager`; each is checked and ended."""
    started: list[Watched] = []

    def start(path: str | None = None, **options: Any) -> Manager:
        options.setdefault("keeper", False)
        manager = Manager(path or folder / f"{len(started)}.sock", **options).start()
        started.append(Watched(manager))
        return manager

    yield start
    for watched in started:
        if watched.alive():
            watched.check()
        watched.manager.shutdown()


@pytest.fixture
def peer(server: Watched) -> Iterator[Peer]:
    """A bare connection to `server`, greeted."""
    with Peer(server.address) as peer:
        yield peer


@pytest.fixture
def child() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts programs: `child(code, *arguments)`, with pipes; those still running are killed.

    The code's arguments are sys.argv[1:].
    """
    started: list[subprocess.Popen[str]] = []

    def start(code: str, *arguments: object) -> subprocess.Popen[str]:
        process = nursery.Process(
            [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()


def line(process: subprocess.Popen[str]) -> str:
    """The next line that *process* prints."""
    assert process.stdout is not None
    text = process.stdout.readline()
    assert text, f"it printed nothing more, status {process.wait()}"
    return text.strip()
