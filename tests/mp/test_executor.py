"""ProcessPoolExecutor: contexts of every kind, futures of every end."""

from __future__ import annotations

import concurrent.futures
import gc
import importlib
import os
import socket
import traceback
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress

import pytest
from conftest import wait_until
from crowding import run_crowded
from users import needs_root

import fdshare
from fdshare import ProcessPoolExecutor, get_context
from fdshare.errors import InvalidArgument
from fdshare.kernel import system
from fdshare.mp.channels.framing import BODY_FOLLOWS, LENGTH
from fdshare.mp.channels.peek_level import AT_ONCE
from mp import children
from mp.common import METHODS, PACKAGES, identity, open_now, trackers  # noqa: F401
from mp.workers.test_worker_handler import BEGINS

# What is there of a result: of its length; of its data; the announcement of one with descriptors.
HALVES = [b"\0\0", LENGTH.pack(5) + b"half", LENGTH.pack(BODY_FOLLOWS)]


def test_it_is_one_of_concurrent_futures() -> None:
    assert issubclass(ProcessPoolExecutor, concurrent.futures.ProcessPoolExecutor)
    assert fdshare.ProcessPoolExecutor is ProcessPoolExecutor


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("package", PACKAGES)
def test_contexts_of_the_packages(package: str, method: str) -> None:
    stock = importlib.import_module(package).get_context(method)
    with ProcessPoolExecutor(1, stock) as executor, socket.socket() as sock:
        assert executor.submit(children.identity, sock).result() == identity(sock)


@pytest.mark.skipif(not system.HAS_SEM_GETVALUE, reason="the level is a semaphore's value")
@pytest.mark.parametrize("method", METHODS)
def test_calls_with_descriptors_are_sent_at_once_to_workers_that_peek(method: str) -> None:
    with ProcessPoolExecutor(2, get_context(method)) as executor, socket.socket() as sock:
        level = executor._call_queue._peek_level
        assert level is not None
        assert level.level() == 0
        for _ in range(10):  # one of two workers has several in a row
            assert executor.submit(children.identity, sock).result() == identity(sock)
        assert level.level() == AT_ONCE
        futures = [executor.submit(children.same, n) for n in range(100)]
        assert [future.result() for future in futures] == list(range(100))
        assert executor.submit(children.identity, sock).result() == identity(sock)


def test_no_context_is_ours_of_the_default_method() -> None:
    with ProcessPoolExecutor(1) as executor, socket.socket() as sock:
        assert executor.submit(children.identity, sock).result() == identity(sock)


def test_what_is_no_context() -> None:
    with pytest.raises(InvalidArgument, match="mp_context"):
        ProcessPoolExecutor(1, object())


def test_an_initializer_and_its_arguments() -> None:
    with open(os.devnull) as file, socket.create_server(("127.0.0.1", 0)) as sock:
        executor = ProcessPoolExecutor(1, None, children.keep, (sock, {"file": file}))
    with executor:
        assert executor.submit(children.read_kept).result() == ""


@pytest.mark.parametrize("package", PACKAGES)
def test_what_a_call_raises(package: str) -> None:
    with ProcessPoolExecutor(1, get_context("fork", backend=package)) as executor:
        error = executor.submit(children.raise_key_error).exception()
        assert traceback.extract_tb(error.__traceback__)[-1].name == "raise_key_error"
        assert type(error.__cause__).__name__ == "_RemoteTraceback"
        assert 'raise KeyError("from the worker")' in str(error.__cause__)
        assert executor.submit(children.same, 1).result() == 1


def at_its_end(near: socket.socket) -> bool:
    """To be asked again and again: where there is no GIL, what this thread has made and another one
    drops is closed by this thread, when it runs."""
    try:
        return near.recv(1, socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False


@pytest.mark.parametrize("how", ["cancel", "shutdown", "break"])
@pytest.mark.parametrize("package", PACKAGES)
def test_peers_of_calls_that_will_not_run_see_the_end_at_once(package: str, how: str) -> None:
    started, go = os.pipe()
    executor = ProcessPoolExecutor(1, get_context("fork", backend=package))
    blockers = [executor.submit(os.read, started, 1) for _ in range(9)]
    pairs = [socket.socketpair() for _ in range(5)]
    futures = [executor.submit(children.identity, far) for _, far in pairs]
    for _, far in pairs:
        far.close()
    if how == "cancel":
        assert all(future.cancel() for future in futures)
    elif how == "shutdown":
        executor.shutdown(wait=False, cancel_futures=True)
    else:
        next(iter(executor._processes.values())).kill()
    try:
        # The executor, the futures and a call that runs are still there.
        for near, _ in pairs:
            wait_until(lambda near=near: at_its_end(near))
    finally:
        os.write(go, b"x" * len(blockers))
        executor.shutdown()
        for near, _ in pairs:
            near.close()
        os.close(started)
        os.close(go)


@pytest.mark.parametrize("wait", [True, False])
@pytest.mark.parametrize("calls", [0, 1])
def test_arguments_of_the_initializer_are_closed_after_the_last_worker(
    calls: int, wait: bool
) -> None:
    near, far = socket.socketpair()
    executor = ProcessPoolExecutor(1, get_context("fork"), children.keep, (far, {"file": far}))
    far.close()
    futures = [executor.submit(children.same, number) for number in range(calls)]
    executor.shutdown(wait)
    executor.shutdown(wait)
    wait_until(lambda: at_its_end(near))
    assert [future.result() for future in futures] == list(range(calls))
    near.close()


def test_replaced_workers_have_the_arguments_of_the_initializer_after_shutdown() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock, open(os.devnull) as file:
        executor = ProcessPoolExecutor(
            1, get_context("spawn"), children.keep, (sock, {"file": file}), max_tasks_per_child=1
        )
    futures = [executor.submit(children.read_kept) for _ in range(3)]
    manager = executor._executor_manager_thread
    executor.shutdown(wait=False)
    executor.shutdown(wait=False)
    assert [future.result(60) for future in futures] == [""] * 3
    manager.join()


def named_semaphores(package: str) -> int:
    """How many this process will remove at its end."""
    cleanup = importlib.import_module(f"{package}.synchronize").SemLock._cleanup
    registry = importlib.import_module(f"{package}.util")._finalizer_registry
    return sum(finalizer._callback is cleanup for finalizer in list(registry.values()))


@pytest.mark.parametrize("cls", [ProcessPoolExecutor, concurrent.futures.ProcessPoolExecutor])
@pytest.mark.parametrize("package", PACKAGES)
def test_named_semaphores_go_with_the_executor(package: str, cls: type) -> None:
    ctx = get_context("forkserver", backend=package)
    gc.collect()
    before = named_semaphores(package)
    gc.disable()  # what is a cycle stays
    try:
        executor = cls(1, ctx)
        assert executor.submit(children.same, 1).result() == 1
        assert named_semaphores(package) > before
        manager = executor._executor_manager_thread
        executor.shutdown()
        del executor, manager
        assert named_semaphores(package) == before
    finally:
        gc.enable()


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("half", HALVES)
def test_a_worker_that_dies_in_the_middle_of_a_result_breaks_the_pool(
    half: bytes, package: str
) -> None:
    executor = ProcessPoolExecutor(2, get_context("fork", backend=package))
    try:
        future = executor.submit(children.die_while_sending, half)
        with pytest.raises(BrokenProcessPool):
            future.result(30)
    finally:
        executor._result_queue._reader._carrier().shutdown(socket.SHUT_RD)  # if it still waits
        executor.shutdown()


def test_a_worker_that_dies_breaks_the_pool_and_leaks_nothing() -> None:
    gc.collect()
    before = open_now()
    with ProcessPoolExecutor(1, get_context("fork")) as executor, socket.socket() as sock:
        futures = [executor.submit(os._exit, 1)]
        with suppress(BrokenProcessPool):  # it may be known by now
            futures.append(executor.submit(children.same, sock))
        for future in futures:
            with pytest.raises(BrokenProcessPool):
                future.result(30)
        with pytest.raises(BrokenProcessPool):
            executor.submit(children.same, sock)
    del executor, future, futures
    gc.collect()
    assert open_now() <= before


@pytest.mark.parametrize("wait", [True, False])
@pytest.mark.parametrize("package", PACKAGES)
def test_workers_are_replaced_after_their_last_task(package: str, wait: bool) -> None:
    ctx = get_context("forkserver", backend=package)
    executor = ProcessPoolExecutor(2, ctx, max_tasks_per_child=2)
    futures = [executor.submit(os.getpid) for _ in range(10)]
    manager = executor._executor_manager_thread
    executor.shutdown(wait=wait)
    assert len({future.result(60) for future in futures}) >= 5
    manager.join()


FIRST = """
import resource
from crowding import children
from fdshare import ProcessPoolExecutor
from mp.common import open_now
def limit(most):
    resource.setrlimit(resource.RLIMIT_NPROC, (most, 100))
executor, other = ProcessPoolExecutor(2, ctx), ProcessPoolExecutor(2, ctx)
before = open_now(), children()
failed = 0
with open("/dev/null") as file:
    for most in range(1, 12):
        limit(most)
        try:
            executor.submit(file.fileno).result(30)
        except (OSError, RuntimeError) as error:
            assert "RLIMIT_NPROC" in str((error, getattr(error, "__notes__", ""))), error
            failed += 1
            assert children() == before[1]
        else:
            break
limit(100)
print(failed > 1, executor.submit(abs, -1).result(30))
executor.shutdown()
limit(1)
try:
    other.submit(abs, -1)
except (OSError, RuntimeError):
    print("raises, and ends")
"""


@needs_root
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("package", PACKAGES)
def test_no_process_can_be_started_for_the_first_call(package: str, method: str) -> None:
    """The workers that could be started were not ended: the program never ended. A thread that was
    not started was taken for one that was, and no call ended."""
    output, errors = run_crowded(BEGINS + FIRST, method, package)
    assert output == "True 1\nraises, and ends\n"
    assert errors == ""
