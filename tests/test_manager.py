"""Manager: what users of multiprocessing's BaseManager expect, and that nothing stays behind."""

from __future__ import annotations

import gc
import json
import multiprocessing
import multiprocessing.managers
import os
import pickle
import signal
import socket
import stat
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hanging import FLUSH, HangingFileSystem, needs_fuse
from mp.common import trackers  # noqa: F401
from users import AsUser, Say

import fdshare.manager
from fdshare.client.blocking.client import Client
from fdshare.errors import (
    AddressInUse,
    AuthenticationFailed,
    ClosedDescriptor,
    EndpointError,
    InvalidArgument,
    NoServer,
    PolicyError,
    ServerGone,
)
from fdshare.manager import Manager

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs another user")


@pytest.fixture
def sock() -> Iterator[socket.socket]:
    with socket.socket() as sock:
        yield sock


def gone(pid: int) -> bool:
    """True where there is no such process any more, or only its status is left."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def pid_of(manager: Manager) -> int:
    assert manager._process is not None
    return manager._process.pid


# As BaseManager


def test_it_travels_as_its_address_and_ends_no_server() -> None:
    with Manager() as manager:
        copy = pickle.loads(pickle.dumps(manager))
        assert type(copy) is Manager
        assert copy.address == manager.address
        copy.connect()
        with copy:
            copy.ping()
        manager.ping()


def test_it_has_what_a_base_manager_has() -> None:
    theirs = multiprocessing.managers.BaseManager
    public = {name for name in dir(theirs) if not name.startswith("_")} | {"shutdown", "__enter__"}
    with Manager(keeper=False) as manager:
        assert public <= {*dir(manager)}


def test_address_and_authkey_by_position(folder: Path, sock: socket.socket) -> None:
    with Manager(folder / "x.sock", b"secret", keeper=False) as manager:
        assert manager.address == str(folder / "x.sock")
        manager.register("x", sock)
        with Client(manager.address) as stranger, pytest.raises(AuthenticationFailed):
            stranger.ping()
        with Manager(manager.address, b"secret").connect() as other:
            assert other.names() == ["x"]


def test_a_server_that_cannot_start_says_why(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (folder / "msgspec.py").write_text("raise ImportError('this one is broken')\n")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    with pytest.raises(ServerGone, match="status 1: ImportError: this one is broken"):
        Manager(folder / "x.sock").start()
    assert capfd.readouterr() == ("", "")


def test_start_and_shutdown(folder: Path, sock: socket.socket) -> None:
    manager = Manager(folder / "x.sock", keeper=False)
    assert manager.start() is manager
    pid = pid_of(manager)
    assert manager.stats().server_pid == pid != os.getpid()
    assert stat.S_IMODE(os.stat(manager.address).st_mode) == 0o600
    manager.register("x", sock)
    manager.shutdown()
    assert manager._process is not None
    assert manager._process.returncode == 0
    assert os.listdir(folder) == ["x.sock.lock"]
    manager.shutdown()
    manager.join()
    with pytest.raises(ClosedDescriptor):
        manager.ping()
    with pytest.raises(InvalidArgument):
        manager.start()


def test_with(folder: Path, sock: socket.socket) -> None:
    with Manager(folder / "x.sock", keeper=False) as manager:
        manager["x"] = sock
        assert "x" in manager
    assert gone(pid_of(manager))
    with Manager(folder / "x.sock", keeper=False).start() as manager:
        assert manager.names() == []


def test_it_is_a_mapping(sock: socket.socket) -> None:
    with Manager(keeper=False) as manager:
        manager["a"] = sock
        manager["b"] = sock
        found = dict(manager)
        for name, copy in [*found.items(), *manager.items()]:
            with copy:
                assert name in ("a", "b")
                assert os.path.sameopenfile(copy.fileno(), sock.fileno())
        for copy in manager.values():
            copy.close()
        assert list(manager) == manager.keys() == ["a", "b"]
        assert manager.get("c") is None
        assert manager.get("c", 5) == manager.pop("c", 5) == 5
        with manager.get("a"), manager.pop("a"):
            assert manager.keys() == ["b"]
        with pytest.raises(KeyError):
            manager.pop("a")


def test_what_is_wrong_says_what_is_wanted(sock: socket.socket) -> None:
    with pytest.raises(InvalidArgument, match="a UNIX socket, write its path"):
        Manager(("localhost", 5000))  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="not bytes; write b"):
        Manager(authkey="secret")  # type: ignore[arg-type]
    with pytest.raises(NoServer, match="call start"):
        Manager().fetch("x")
    with Manager(keeper=False) as manager:
        with pytest.raises(InvalidArgument, match="none of server, connection, process"):
            manager.register("x", sock, lifetime="forever")  # type: ignore[arg-type]
        with pytest.raises(InvalidArgument, match="'5' is not a number of seconds"):
            manager.register("x", sock, ttl="5")  # type: ignore[arg-type]
        with pytest.raises(InvalidArgument, match="'5' is not a number of seconds"):
            manager.fetch("x", timeout="5")  # type: ignore[arg-type]


def test_without_a_path() -> None:
    with Manager(keeper=False) as manager:
        folder = os.path.dirname(manager.address)
        assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
        manager.ping()
    assert not os.path.exists(folder)
    manager = Manager(keeper=False)  # never started
    folder = os.path.dirname(manager.address)
    del manager
    gc.collect()
    assert not os.path.exists(folder)


def test_what_it_held_is_closed_at_the_end() -> None:
    reading, writing = os.pipe()
    with open(reading) as reader, Manager(keeper=False) as manager:
        manager.register("pipe", writing)
        os.close(writing)
        manager.shutdown()
        assert reader.read() == ""


def test_one_that_is_never_started_leaves_no_folder(folder: Path) -> None:
    code = """
        import os, signal, fdshare
        manager = fdshare.Manager()
        print(repr(manager), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "TMPDIR": str(folder)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.startswith(f"<Manager of {folder}/fdshare-")
    assert done.stdout.endswith("/fdshare.sock not started>\n")
    assert os.listdir(folder) == []


def test_its_private_folder_is_nobody_elses(folder: Path) -> None:
    manager = Manager(keeper=False)
    os.mkdir(os.path.dirname(manager.address))
    with pytest.raises(EndpointError, match="File exists"):
        manager.start()
    os.rmdir(os.path.dirname(manager.address))
    with manager:
        assert repr(manager) == f"<Manager of {manager.address} pid {manager._process.pid}>"


def test_connect(serve: Callable[..., Manager], folder: Path, sock: socket.socket) -> None:
    with pytest.raises(NoServer):
        Manager(folder / "absent", keeper=False).connect()
    owner = serve()
    connected = Manager(owner.address, keeper=False)
    with pytest.raises(InvalidArgument):
        connected.join()
    assert connected.connect() is connected
    with connected:  # does not start another, nor end the one
        connected.register("x", sock)
    assert owner.names() == ["x"]


def test_shutdown_by_whoever_is_connected(serve: Callable[..., Manager]) -> None:
    owner = serve()
    Manager(owner.address, keeper=False).connect().shutdown()
    owner.join(20)
    assert gone(pid_of(owner))
    assert not os.path.exists(owner.address)


def test_join_ends_in_time(serve: Callable[..., Manager]) -> None:
    owner = serve()
    owner.join(0.01)
    assert not gone(pid_of(owner))


def test_get_server(folder: Path, sock: socket.socket, until: Callable[..., Any]) -> None:
    """A server of this process: listening from the first moment, serving in any thread."""
    manager = Manager(folder / "x.sock", keeper=False)
    server = manager.get_server()
    assert server.address == manager.address
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    manager.register("x", sock)
    with manager.fetch("x") as fetched:
        assert os.path.samestat(os.fstat(fetched.fileno()), os.fstat(sock.fileno()))
    assert manager.stats().server_pid == os.getpid()
    server.stop()
    thread.join()
    assert not os.path.exists(manager.address)
    manager.close()


def test_a_server_of_this_process_is_shut_down_by_a_client(folder: Path) -> None:
    manager = Manager(folder / "x.sock", keeper=False)
    server = manager.get_server()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    manager.shutdown()
    thread.join()
    assert not os.path.exists(manager.address)


def test_a_server_that_never_served(folder: Path) -> None:
    server = Manager(folder / "x.sock", keeper=False).get_server()
    assert os.path.exists(server.address)
    server.close()
    server.close()
    assert not os.path.exists(server.address)


# What cannot be started


def test_a_live_server_on_the_path(serve: Callable[..., Manager]) -> None:
    owner = serve()
    for start in (Manager.start, Manager.get_server):
        with pytest.raises(AddressInUse) as caught:
            start(Manager(owner.address, keeper=False))
        assert caught.value.pid == pid_of(owner)
    owner.ping()


def test_two_starters_at_once(folder: Path) -> None:
    """On a path where a dead server left its socket: one of them has it."""
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(folder / "x.sock"))
    managers = [Manager(folder / "x.sock", keeper=False) for _ in range(4)]
    started: list[Manager] = []
    refused: list[AddressInUse] = []

    def start(manager: Manager) -> None:
        try:
            started.append(manager.start())
        except AddressInUse as error:
            refused.append(error)

    threads = [threading.Thread(target=start, args=(manager,)) for manager in managers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = started
    assert len(refused) == 3
    winner.ping()
    winner.shutdown()


@pytest.mark.parametrize("what", ["file", "directory", "missing", "fifo"])
def test_paths_that_cannot_be_bound(folder: Path, what: str) -> None:
    path = folder / "x"
    expected: type[Exception] = AddressInUse
    if what == "file":
        path.write_text("keep me")
    elif what == "directory":
        path.mkdir()
    elif what == "fifo":
        os.mkfifo(path)
    else:
        path, expected = folder / "absent" / "x.sock", EndpointError
    for start in (Manager.start, Manager.get_server):
        with pytest.raises(expected) as caught:
            start(Manager(path, keeper=False))
        assert isinstance(caught.value, OSError)
        assert str(path) in str(caught.value)
    if what == "file":
        assert path.read_text() == "keep me"
        assert os.listdir(folder) == ["x"]


@needs_root
def test_a_folder_of_somebody_else(folder: Path, child: Any) -> None:
    folder.chmod(0o755)
    process = child(
        """
        import os, sys
        from fdshare.errors import EndpointError
        from fdshare.manager import Manager
        os.setgid(12345); os.setuid(12345)
        try:
            Manager(sys.argv[1], keeper=False).get_server()
        except EndpointError as error:
            print(error.errno, error, flush=True)
        """,
        folder / "x.sock",
    )
    said = process.stdout.readline()
    assert said.startswith("13 ")
    assert str(folder) in said


def test_settings_that_are_none(folder: Path) -> None:
    with pytest.raises(InvalidArgument):
        Manager(folder / "x.sock", keeper=False, limits={"max_fun": 1}).start()
    with pytest.raises(InvalidArgument):
        Manager(folder / "x.sock", keeper=False, limits={"max_names": 0}).start()
    policy = folder / "policy.toml"
    policy.write_text("this is no policy")
    with pytest.raises(PolicyError) as caught:
        Manager(folder / "x.sock", keeper=False, policy=policy).start()
    assert caught.value.file == str(policy)
    assert "x.sock" not in os.listdir(folder)


# Ends


def test_signals_end_it(serve: Callable[..., Manager], sock: socket.socket) -> None:
    """SIGTERM does; SIGINT, which a terminal sends to all, is its owner's."""
    owner = serve()
    owner.register("x", sock)
    os.kill(pid_of(owner), signal.SIGINT)
    os.kill(pid_of(owner), signal.SIGHUP)
    assert owner.names() == ["x"]
    os.kill(pid_of(owner), signal.SIGTERM)
    owner.join(20)
    assert owner._process is not None
    assert owner._process.returncode == 0
    assert not os.path.exists(owner.address)


@pytest.mark.parametrize("keeper", [False, True])
def test_its_signals_are_for_the_main_thread(
    serve: Callable[..., Manager], until: Callable[..., Any], sock: socket.socket, keeper: bool
) -> None:
    """One that another thread is given does not interrupt the wait for events."""
    owner = serve(keeper=keeper)
    owner.register("x", sock)
    owner.unregister("x")  # a thread closes what is let go
    stats = owner.stats()
    pid = stats.keeper_pid if keeper else stats.server_pid
    others = until(lambda: sorted(map(int, os.listdir(f"/proc/{pid}/task")))[1:], "a thread")
    for thread in others:
        with open(f"/proc/{pid}/task/{thread}/status") as file:
            (blocked,) = (int(line.split()[1], 16) for line in file if line.startswith("SigBlk"))
        assert blocked & 1 << signal.SIGTERM - 1
    os.kill(pid, signal.SIGTERM)
    owner.join(20)
    assert owner._process is not None
    assert owner._process.returncode == 0


OWNER = """
    import os, socket, sys, time
    from fdshare.manager import Manager
    manager = Manager(keeper=False).start()
    manager.register("x", 0)
    {prelude}
    print(manager.address, manager.stats().server_pid, flush=True)
    sys.stdin.readline()
    {end}
"""


@pytest.mark.parametrize(
    "end",
    [
        "pass",
        "manager.shutdown()",
        "del manager",
        "os._exit(3)",
        "1 / 0",
        "os.execlp('true', 'true')",
    ],
)
def test_it_ends_with_its_owner(child: Any, until: Callable[..., Any], end: str) -> None:
    process = child(OWNER.format(prelude="pass", end=end))
    address, pid = process.stdout.readline().split()
    assert not gone(int(pid))
    process.stdin.write("\n")
    process.stdin.flush()
    process.wait()
    until(lambda: gone(int(pid)), "the server to end")
    assert not os.path.exists(address)


PRIVATE = """
import fdshare, select
manager = fdshare.Manager(keeper=%s).start()
print(manager.address, flush=True)
select.select([], [], [])
"""


@pytest.mark.parametrize("keeper", [False, True])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_its_folder_goes_with_an_owner_that_is_killed(
    until: Callable[..., Any], keeper: bool, number: signal.Signals
) -> None:
    package = Path(fdshare.__file__).parent.parent
    command = [sys.executable, "-c", PRIVATE % keeper]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=package) as process:
        assert process.stdout is not None
        folder = os.path.dirname(process.stdout.readline().strip())
        assert os.listdir(folder)
        process.send_signal(number)
    until(lambda: not os.path.exists(folder), "the server ends and removes its folder")


def test_it_ends_with_an_owner_that_is_killed(child: Any, until: Callable[..., Any]) -> None:
    process = child(OWNER.format(prelude="pass", end="pass"))
    address, pid = process.stdout.readline().split()
    process.kill()
    until(lambda: gone(int(pid)), "the server to end")
    assert not os.path.exists(address)


def test_children_of_the_owner_do_not_keep_it(child: Any, until: Callable[..., Any]) -> None:
    """Nor do they end it."""
    prelude = """
    if not os.fork():
        os._exit(0)
    os.wait()
    lives = os.fork()
    if not lives:
        manager.fetch("x").close()
        time.sleep(60)
        os._exit(0)
    manager.ping()
    """
    end = "print(lives, flush=True); sys.stdin.readline()"
    process = child(OWNER.format(prelude=prelude, end=end))
    _, pid = process.stdout.readline().split()
    process.stdin.write("\n")
    process.stdin.flush()
    lives = int(process.stdout.readline())
    try:
        assert not gone(int(pid))
        process.kill()
        until(lambda: gone(int(pid)), "the server to end")
        assert not gone(lives)
    finally:
        os.kill(lives, signal.SIGKILL)


WITHOUT_STREAMS = """
import json, os, signal
for number in {closed}:
    os.close(number)
from fdshare.manager import Manager
manager = Manager({path!r}).start()
with open(os.devnull) as file:
    manager.register("a", file)
os.kill(manager.stats().server_pid, signal.SIGKILL)  # the other half logs that
names, stats = manager.names(), manager.stats()
pids = [stats.server_pid, stats.keeper_pid]
streams = [[os.readlink(f"/proc/{{pid}}/fd/{{number}}") for number in {closed}] for pid in pids]
with open({told!r}, "w") as told:
    json.dump({{"names": names, "pids": pids, "streams": streams}}, told)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("closed", [(2,), (0, 2), (0, 1, 2)], ids=str)
def test_an_owner_without_standard_streams(
    folder: Path, until: Callable[..., Any], closed: tuple[int, ...]
) -> None:
    """What is logged stays out of the control socket, which tells the server of its owner's end."""
    told = folder / "told"
    code = WITHOUT_STREAMS.format(closed=closed, path=str(folder / "s"), told=str(told))
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == -signal.SIGKILL
    said = json.loads(told.read_text())
    assert said["names"] == ["a"]
    assert said["streams"] == [["/dev/null"] * len(closed)] * 2
    until(lambda: all(map(gone, said["pids"])), "the server to end")


def test_dropped_without_a_word(until: Callable[..., Any]) -> None:
    manager = Manager(keeper=False).start()
    pid, folder = pid_of(manager), os.path.dirname(manager.address)
    del manager
    gc.collect()
    assert gone(pid)
    assert not os.path.exists(folder)


def test_it_says_nothing(folder: Path) -> None:
    """Neither of both processes has anything to warn of, from the start to the end."""
    code = (
        "import os; from fdshare.manager import Manager\n"
        "with Manager(keeper=False) as m: m.register('x', 0); m.fetch('x').close()\n"
        "m = Manager(keeper=False).start(); m.register('x', 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-X", "dev", "-c", code], capture_output=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


# Pickles


def use(manager: Manager, results: Any) -> None:
    with socket.socket() as sock:
        manager.register("child", sock)
    manager.fetch("x").close()
    results.put(manager.info("child").registrant.pid)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
@pytest.mark.parametrize("authkey", [None, b"secret"])
def test_in_children(
    serve: Callable[..., Manager], sock: socket.socket, method: str, authkey: bytes | None
) -> None:
    """A child gets the verbs; the server stays its parent's."""
    manager = serve(authkey=authkey)
    manager.register("x", sock)
    context = multiprocessing.get_context(method)
    results = context.SimpleQueue()
    process = context.Process(target=use, args=(manager, results))
    process.start()
    assert results.get() == process.pid
    process.join()
    process.close()
    results.close()
    assert manager.names() == ["child", "x"]


@needs_fuse
def test_a_server_that_hangs_in_its_end_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A file system does not answer when it closes what it held."""
    monkeypatch.setattr(fdshare.manager, "_GRACE", 0.5)  # which is waited for twice
    manager = Manager().start()
    assert manager._process is not None
    process, files = manager._process, HangingFileSystem(0)

    def register(say: Say) -> int:
        file = files.open()
        with Client(manager.address) as client:
            client.register("file", file)
        files.hang(FLUSH)
        say("registered")
        return file

    with AsUser(0, register, file_system=files) as other:
        assert other.hear() == "registered"
        manager.shutdown()
        assert "hangs in its end" in caplog.text
        assert not os.path.exists(manager.address)
    process.wait(20)
