"""install() and uninstall(): what they change, what they do not, and all that goes through."""

from __future__ import annotations

import ctypes
import importlib
import io
import multiprocessing
import multiprocessing.reduction
import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lambdas import needs_lambdas
from users import needs_root

import fdshare
from fdshare.errors import ClosedDescriptor, InvalidArgument, NoServer
from fdshare.mp.pickling import install
from mp.common import ends, trackers  # noqa: F401

ForkingPickler = multiprocessing.reduction.ForkingPickler
Pair = tuple[socket.socket, socket.socket]


def dumps(obj: Any) -> bytes:
    return bytes(ForkingPickler.dumps(obj))


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
@pytest.mark.parametrize(
    "package", ["multiprocessing", pytest.param("multiprocess", marks=needs_lambdas)]
)
def test_every_channel(package: str, method: str) -> None:
    program = Path(__file__).with_name("stock_channels.py")
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", str(program), package, method],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == [
        "through_a_queue",
        "through_a_simple_queue_and_a_pipe",
        "from_one_who_is_gone",
        "as_arguments_of_a_process",
        "through_a_pool",
        "through_an_executor",
        "only_once",
    ]


def fork_while_it_is_locked() -> None:
    with install._lock:  # by another thread, for instance
        pid = os.fork()
        if not pid:
            fdshare.install()
            fdshare.uninstall()
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0


def test_a_child_that_is_forked_meanwhile_can_install() -> None:
    ends(fork_while_it_is_locked)


def enter_network_namespace() -> None:
    assert not ctypes.CDLL(None).unshare(0x40000000)  # CLONE_NEWNET


def answered(sock: socket.socket) -> socket.socket:
    """The peer of a socket that the worker keeps."""
    with sock:
        sock.sendall(b"to")
    near, far = socket.socketpair()
    with near:
        near.sendall(b"from")
    return far


@needs_root
@pytest.mark.parametrize("package", ["multiprocessing", "multiprocess"])
def test_workers_in_a_network_namespace(armed: None, pair: Pair, package: str) -> None:
    context = importlib.import_module(package).get_context("fork")
    with context.Pool(1, initializer=enter_network_namespace) as pool:
        arrived = pool.apply_async(answered, (pair[0],)).get(60)
    pool.join()
    with arrived:
        assert arrived.recv(10) == b"from"
    assert pair[1].recv(10) == b"to"


@pytest.mark.parametrize("package", ["multiprocessing", "multiprocess"])
def test_uninstall_leaves_nothing(package: str) -> None:
    reduction = pytest.importorskip(f"{package}.reduction")
    before = dict(vars(reduction.ForkingPickler))
    tables = dict(reduction.ForkingPickler._extra_reducers)
    finders = list(sys.meta_path)
    fdshare.install()
    assert vars(reduction.ForkingPickler) != before
    fdshare.install(ttl=5)
    fdshare.uninstall()
    assert dict(vars(reduction.ForkingPickler)) == before
    assert reduction.ForkingPickler._extra_reducers == tables
    assert sys.meta_path == finders
    fdshare.uninstall()  # once more does nothing


def test_no_import_installs() -> None:
    code = (
        "import multiprocessing.reduction as r; before = dict(vars(r.ForkingPickler))\n"
        "from fdshare.mp.pickling import hold, install, parked; import fdshare; fdshare.hold\n"
        "assert dict(vars(r.ForkingPickler)) == before\n"
        "import sys; assert 'dill' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_multiprocess_imported_later() -> None:
    code = (
        "import fdshare, sys, socket; fdshare.install(); assert 'multiprocess' not in sys.modules\n"
        "finders = len(sys.meta_path)\n"
        "import multiprocess; a, b = socket.socketpair(); q = multiprocess.SimpleQueue()\n"
        "assert len(sys.meta_path) == finders - 1\n"
        "q.put([a]); q.get()[0].sendall(b'x'); assert b.recv(1) == b'x'\n"
        "fdshare.uninstall()\n"
        "import multiprocess.reduction as r\n"
        "assert 'reducer_override' not in vars(r.ForkingPickler)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_other_pickles_stay_what_they_are(armed: None, pair: Pair) -> None:
    near, _ = pair
    with pytest.raises(TypeError):
        pickle.dumps(near)
    with pytest.raises(TypeError):
        pickle.dumps(io.FileIO(near.fileno(), closefd=False))


def test_numbers_and_functions_pickle_the_same(armed: None) -> None:
    message = {"n": [1, 2.5, None], "f": test_no_import_installs, "e": ValueError("x", 2)}
    armed_pickle = dumps(message)
    fdshare.uninstall()
    assert dumps(message) == armed_pickle


def test_what_dumps_returns_is_of_the_standard_type(armed: None, pair: Pair) -> None:
    for obj in (5, "text", None, [1], pair[0], [pair[0]]):
        pickled = ForkingPickler.dumps(obj)
        assert type(pickled) is memoryview
        arrived = pickle.loads(pickled)
        if obj is pair[0]:
            arrived.close()
        elif isinstance(arrived, list) and arrived != [1]:
            arrived[0].close()


def test_loaded_after_uninstall(pair: Pair) -> None:
    near, far = pair
    fdshare.install()
    message = dumps(near)
    fdshare.uninstall()
    with pickle.loads(message) as sock:
        sock.sendall(b"x")
    assert far.recv(1) == b"x"
    fdshare.uninstall()  # loading has connected again


def test_a_timeout_of_zero_is_none(armed: None) -> None:
    for bad in (0, -1, float("inf"), float("nan")):
        with pytest.raises(InvalidArgument, match="ttl"):
            fdshare.install(ttl=bad)


def test_a_path_without_server(folder: Path) -> None:
    with pytest.raises(NoServer):
        fdshare.install(folder / "nobody")
    with pytest.raises(AttributeError):
        ForkingPickler.reducer_override  # noqa: B018


def test_sockets_as_a_kind_of_the_programs_own(armed: None, pair: Pair) -> None:
    fdshare.register_kind(
        socket.socket, "test-socket", lambda s: ("mine", [s, s]), lambda said, fds: (said, fds)
    )
    try:
        said, arrived = pickle.loads(dumps(pair[0]))
    finally:
        fdshare.unregister_kind("test-socket")
    assert said == "mine"
    assert len(arrived) == 2
    for descriptor in arrived:
        descriptor.close()


def test_a_closed_socket(armed: None, pair: Pair) -> None:
    pair[0].close()
    for message in (pair[0], [pair[0]]):
        with pytest.raises(ClosedDescriptor):
            dumps(message)


def test_a_subclass_of_socket(armed: None, pair: Pair) -> None:
    class Mine(socket.socket):
        pass

    with Mine(fileno=pair[0].detach()) as sock, pickle.loads(dumps(sock)) as arrived:
        assert type(arrived) is socket.socket
        arrived.sendall(b"x")
        assert pair[1].recv(1) == b"x"


def test_the_other_packages_connection(armed: None) -> None:
    other = pytest.importorskip("multiprocess")
    reader, writer = other.Pipe(duplex=False)
    queue = multiprocessing.SimpleQueue()
    queue.put(reader)
    arrived = queue.get()
    assert type(arrived) is type(reader)
    writer.send(7)
    assert arrived.recv() == 7
    for end in (reader, writer, arrived):
        end.close()
    queue.close()


# Processes that were there before, or come first


def _fresh(_: int) -> Any:
    """In a worker: two ends, of which nobody else knows."""
    return socket.socketpair()


def _known(sock: socket.socket) -> Any:
    sock.sendall(b"x")
    return [sock, socket.socketpair()]


def test_workers_that_are_older_than_install(pair: Pair) -> None:
    """The first thing that they are sent arms them, so that they can answer."""
    near, far = pair
    with multiprocessing.get_context("fork").Pool(1) as pool:
        fdshare.install()
        back, others = pool.apply_async(_known, (fdshare.hold(near),)).get(20)
        assert far.recv(1) == b"x"
        others[0].sendall(b"y")
        assert others[1].recv(1) == b"y"
        for sock in (back, *others):
            sock.close()
    fdshare.uninstall()


def test_a_daemonic_worker_needs_the_server_first(armed: None) -> None:
    with multiprocessing.get_context("fork").Pool(2) as pool:
        pairs = pool.map_async(_fresh, range(6), chunksize=1).get(20)
    for near, far in pairs:
        near.sendall(b"x")
        assert far.recv(1) == b"x"
        near.close()
        far.close()
