"""What breaks when the standard library passes descriptors, row by row: here it works.

Named after what one does. Each is done over the channels of a context of ours.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import multiprocess
import pytest

from fdshare import ProcessPoolExecutor, get_context
from fdshare.errors import AlreadyTaken, DescriptorLimit, NoTransit
from fdshare.mp.backends import backend_of
from fdshare.mp.pickling.reducers import dumps
from mp import children
from mp.common import descriptor_limit_reached, finish, identity, open_now, trackers  # noqa: F401


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield sock


@pytest.fixture
def ctx() -> Any:
    return get_context("fork")


def test_sender_exits_before_get(ctx: Any, listener: socket.socket) -> None:
    queue = ctx.Queue()
    sender = ctx.Process(target=children.put, args=(queue, listener))
    sender.start()
    sender.join()
    with queue.get() as arrived:
        assert identity(arrived) == identity(listener)
    finish(queue)


@pytest.mark.parametrize("channel", ["Queue", "SimpleQueue", "JoinableQueue", "Pipe"])
def test_put_and_close_straight_after(ctx: Any, channel: str) -> None:
    reader = writer = None
    if channel == "Pipe":
        reader, writer = ctx.Pipe(duplex=False)
        send, receive = writer.send, reader.recv
    else:
        queue = getattr(ctx, channel)()
        send, receive = queue.put, queue.get
    for _ in range(50):
        left, right = socket.socketpair()
        with right:
            send(left)
            left.close()
            with receive() as arrived:
                arrived.send(b"there")
                assert right.recv(9) == b"there"
    for end in (reader, writer) if reader else (queue._reader, queue._writer):
        end.close()


def test_submit_and_close_straight_after(ctx: Any) -> None:
    with ctx.Pool(2) as pool, ProcessPoolExecutor(2, ctx) as executor:
        for submit in (
            lambda f, *a: pool.apply_async(f, a).get,
            lambda *a: executor.submit(*a).result,
        ):
            results = []
            for _ in range(20):
                with socket.socket() as sock:
                    results.append((identity(sock), submit(children.identity, sock)))
            assert all(result(30) == expected for expected, result in results)
        pool.close()
        pool.join()


def test_map_and_close_straight_after(ctx: Any) -> None:
    with ctx.Pool(2) as pool, ProcessPoolExecutor(2, ctx) as executor:
        for _ in range(2):
            sockets = children.many_sockets(30)
            expected = list(map(identity, sockets))
            mapped, futures = (
                pool.map_async(children.identity, sockets),
                executor.map(children.identity, sockets),
            )
            children.close_all(sockets)
            assert mapped.get(30) == expected
            assert list(futures) == expected
        pool.close()
        pool.join()


def test_drop_a_queue_with_200_undelivered_sockets(ctx: Any) -> None:
    reader, writer = os.pipe()
    queue = ctx.Queue()
    for _ in range(200):
        with os.fdopen(os.dup(writer), "wb") as file:
            queue.put(file)
    finish(queue)
    del queue
    gc.collect()
    os.close(writer)
    # The end of the pipe comes when its last writer is closed, in flight or not.
    assert os.read(reader, 1) == b""
    os.close(reader)


def test_load_the_same_pickle_twice(listener: socket.socket) -> None:
    family = backend_of("multiprocessing").FAMILY
    bundle = dumps(family, [listener]).own()
    data = bytes(bundle.data)
    with bundle.load(family.loads)[0] as arrived:
        assert identity(arrived) == identity(listener)
    with pytest.raises(AlreadyTaken, match="loaded before"):
        bundle.load(family.loads)
    with pytest.raises(AlreadyTaken):
        pickle.loads(data)


UNRELATED = """
import socket, sys
from fdshare.mp.backends import backend_of
class Shared(backend_of("multiprocessing").CLASSES.SyncManager): pass
Shared.register("inbox")
manager = Shared(address=sys.argv[1], authkey=b"explicit")
manager.connect()
left, right = socket.socketpair()
manager.inbox().put(left)
right.send(b"from a stranger")
"""


def test_a_manager_with_an_explicit_authkey_and_an_unrelated_process(folder: Path) -> None:
    class Shared(backend_of("multiprocessing").CLASSES.SyncManager):  # type: ignore[misc]
        pass

    Shared.register("inbox", callable=_inbox)
    address = str(folder / "manager")
    with Shared(address=address, authkey=b"explicit", ctx=get_context("fork")) as manager:
        subprocess.run([sys.executable, "-c", UNRELATED, address], check=True)
        with manager.inbox().get() as arrived:
            assert arrived.recv(99) == b"from a stranger"


_INBOX: Any = None


def _inbox() -> Any:
    global _INBOX
    import queue

    _INBOX = _INBOX or queue.Queue()
    return _INBOX


@pytest.mark.parametrize("mode", ["w+", "w+b"])
def test_files_share_the_open_file_description(ctx: Any, mode: str) -> None:
    queue = ctx.Queue()
    with tempfile.TemporaryFile(mode) as file:
        file.write("written" if mode == "w+" else b"written")
        queue.put(file)
        with queue.get(timeout=30) as arrived:
            assert arrived.tell() == 7
            arrived.seek(2)
            assert os.lseek(file.fileno(), 0, os.SEEK_CUR) == 2
    finish(queue)


@pytest.mark.parametrize("count", [1, 300])
def test_receiver_at_its_descriptor_limit(ctx: Any, count: int) -> None:
    queue = ctx.SimpleQueue()
    sockets = children.many_sockets(count)
    expected = list(map(identity, sockets))
    queue.put(sockets if count > 1 else sockets[0])
    children.close_all(sockets)
    used = open_now()
    with descriptor_limit_reached():
        for _ in range(3):
            with pytest.raises(DescriptorLimit, match="RLIMIT_NOFILE of the receiver") as refusal:
                queue.get()
            assert isinstance(refusal.value, OSError)
    assert open_now() == used
    arrived = queue.get()
    arrived = arrived if count > 1 else [arrived]
    assert list(map(identity, arrived)) == expected
    children.close_all(arrived)
    queue.put(5)
    assert queue.get() == 5
    queue.close()


def test_what_is_received_is_close_on_exec(ctx: Any, listener: socket.socket) -> None:
    os.set_inheritable(listener.fileno(), True)
    left, right = ctx.Pipe()
    with left, right:
        left.send(listener)
        with right.recv() as arrived:
            assert not os.get_inheritable(arrived.fileno())


@pytest.mark.parametrize("timeout", [None, 0.0, 4.5])
def test_a_socket_keeps_its_timeout(ctx: Any, timeout: float | None) -> None:
    with ctx.Pool(1) as pool, socket.socket() as sock:
        sock.settimeout(timeout)
        found = pool.apply(children.flags_of, (sock,))
        assert found == (False, timeout, timeout is None)


def test_a_pool_worker_of_one_task_returns_a_socket(ctx: Any) -> None:
    with ctx.Pool(2, maxtasksperchild=1) as pool:
        for sockets in pool.map(children.many_sockets, [2] * 8, chunksize=1):
            assert len(sockets) == 2
            children.close_all(sockets)
        pool.close()
        pool.join()


def test_an_executors_worker_of_one_task_returns_a_socket() -> None:
    with ProcessPoolExecutor(2, get_context("spawn"), max_tasks_per_child=1) as executor:
        for sockets in executor.map(children.many_sockets, [2] * 4):
            assert len(sockets) == 2
            children.close_all(sockets)


def test_no_sharer_listens(listener: socket.socket) -> None:
    code = (
        "import socket, sys\n"
        "from fdshare import get_context\n"
        "queue = get_context('fork').Queue()\n"
        "with socket.socket() as sock:\n"
        "    queue.put(sock)\n"
        "    queue.get().close()\n"
        "sharer = sys.modules.get('multiprocessing.resource_sharer')\n"
        "assert sharer is None or sharer._resource_sharer._listener is None\n"
        "import threading\n"
        "assert threading.active_count() == 1\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_more_than_250_descriptors_as_process_arguments(method: str) -> None:
    ctx = get_context(method)
    queue = ctx.SimpleQueue()
    sockets = children.many_sockets(300)
    process = ctx.Process(target=children.answer, args=(queue, *sockets))
    process.start()
    assert [queue.get() for _ in sockets] == list(map(identity, sockets))
    process.join()
    children.close_all(sockets)
    queue.close()


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_two_objects_on_one_descriptor_as_process_arguments(
    method: str, listener: socket.socket
) -> None:
    ctx = get_context(method)
    queue = ctx.SimpleQueue()
    with open(os.dup(listener.fileno()), "rb", buffering=0) as twin:
        same_number = open(twin.fileno(), "rb", buffering=0, closefd=False)
        process = ctx.Process(target=children.answer, args=(queue, twin, same_number, listener))
        process.start()
        assert [queue.get() for _ in range(3)] == [identity(listener)] * 3
        process.join()
    queue.close()


def test_a_socket_subclass(ctx: Any) -> None:
    class Mine(socket.socket):
        pass

    left, right = ctx.Pipe()
    with left, right, Mine() as sock:
        left.send(sock)
        with right.recv() as arrived:
            assert type(arrived) is socket.socket
            assert identity(arrived) == identity(sock)


def test_plain_pickle_of_a_connection_is_refused(ctx: Any) -> None:
    left, right = ctx.Pipe()
    with left, right, pytest.raises(NoTransit, match=r"install\(\)|get_context"):
        pickle.dumps(left)
    with socket.socket() as sock, pytest.raises(TypeError):
        pickle.dumps(sock)


@pytest.mark.parametrize("backend", ["multiprocessing", "multiprocess"])
@pytest.mark.parametrize("package", [multiprocessing, multiprocess], ids=lambda p: p.__name__)
def test_a_connection_of_one_package_through_the_other(backend: str, package: Any) -> None:
    ctx = get_context("fork", backend=backend)
    left, right = ctx.Pipe()
    reader, writer = package.Pipe(duplex=False)
    with left, right, reader, writer:
        left.send([reader])
        reader.close()
        with right.recv()[0] as arrived:
            assert isinstance(arrived, package.connection.Connection)
            writer.send("through")
            assert arrived.recv() == "through"


@pytest.mark.parametrize("backend", ["multiprocessing", "multiprocess"])
def test_an_exception_of_two_arguments_from_a_worker(backend: str) -> None:
    ctx = get_context("fork", backend=backend)
    with ctx.Pool(1) as pool, ProcessPoolExecutor(1, ctx) as executor:
        for call in (
            lambda: pool.apply(children.raise_two_arguments),
            lambda: executor.submit(children.raise_two_arguments).result(),
        ):
            with pytest.raises(children.TwoArguments, match="seven") as caught:
                call()
            assert caught.value.code == 7
            last = traceback.extract_tb(caught.value.__traceback__)[-1]
            assert (Path(last.filename).name, last.name) == ("children.py", "raise_two_arguments")
            assert "raise TwoArguments(7" in str(last.line)


def test_threads_do_not_wait_for_each_other(ctx: Any) -> None:
    """No head-of-line: a peer that does not read stops its own channel only."""
    stuck, _unread = ctx.Pipe()
    blocker = threading.Thread(target=lambda: stuck.send(b"x" * (1 << 22)), daemon=True)
    blocker.start()
    left, right = ctx.Pipe()
    with left, right, socket.socket() as sock:
        left.send(sock)
        right.recv().close()
    assert len(_unread.recv()) == 1 << 22
    blocker.join()
    stuck.close()
    _unread.close()
