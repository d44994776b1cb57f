"""Pools: what is held for later workers, results in any order, ends of any kind."""

from __future__ import annotations

import gc
import os
import select
import signal
import socket
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from breaking import ended, has_flock, state
from conftest import wait_until
from crowding import run_crowded
from users import needs_root

from fdshare import SharedMemory, get_context
from fdshare.errors import ClosedDescriptor
from fdshare.mp.channels.framing import LENGTH, framed
from fdshare.mp.channels.incoming import MARK, TORN
from fdshare.mp.workers.tasks import HEAD_SIZE
from mp import children
from mp.common import (  # noqa: F401
    METHODS,
    PACKAGES,
    descriptor_limit_reached,
    ends,
    identity,
    open_now,
    trackers,
    writable,
)
from mp.workers.test_worker_handler import BEGINS


@pytest.fixture(params=PACKAGES)
def package(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("method", METHODS)
def test_arguments_of_the_initializer_are_held_for_the_pools_life(
    method: str, package: str
) -> None:
    ctx = get_context(method, backend=package)
    sock = socket.create_server(("127.0.0.1", 0))
    file = tempfile.TemporaryFile("w+")
    file.write("kept!")
    with ctx.Pool(1, children.keep, (sock, {"file": file}), maxtasksperchild=1) as pool:
        sock.close()
        file.close()
        assert [pool.apply(children.read_kept) for _ in range(3)] == ["kept!"] * 3
        pool.close()
        pool.join()


def test_locks_and_queues_as_arguments_of_the_initializer(package: str) -> None:
    for method in ("fork", "spawn"):
        ctx = get_context(method, backend=package)
        queue, lock = ctx.SimpleQueue(), ctx.Lock()
        with socket.socket() as sock:
            pool = ctx.Pool(1, children.keep, ([queue, lock], sock))
        with pool:
            assert pool.apply(len, ([1, 2],)) == 2
            pool.close()
            pool.join()
        queue.close()


def test_what_cannot_be_shared_as_an_argument_of_the_initializer(package: str) -> None:
    closed = socket.socket()
    closed.close()
    with get_context("fork", backend=package).Pool(1, children.keep, (closed, 2)) as pool:
        assert pool.apply(children.kept, (1,)) == 2
        pool.close()
        pool.join()
    with pytest.raises(ClosedDescriptor):
        get_context("spawn", backend=package).Pool(1, children.keep, (closed, 2))


def test_every_way_to_ask(package: str) -> None:
    ctx = get_context("fork", backend=package)
    with ctx.Pool(2) as pool, socket.socket() as sock, open(os.devnull) as file:
        things = [sock, file, sock]
        expected = list(map(identity, things))
        assert pool.map(children.identity, things) == expected
        assert list(pool.imap(children.identity, things)) == expected
        assert list(pool.imap(children.identity, iter(things), chunksize=2)) == expected
        assert sorted(pool.imap_unordered(children.identity, things)) == sorted(expected)
        assert pool.starmap(children.identity, [(thing,) for thing in things]) == expected
        assert pool.apply(children.identity, kwds={"obj": sock}) == identity(sock)
        back = pool.map_async(children.same, things).get(30)
        assert list(map(identity, back)) == expected
        children.close_all(back)
        called: list[Any] = []
        pool.apply_async(children.identity, (file,), callback=called.append).wait(30)
        assert called == [identity(file)]
        assert pool.map(len, []) == []
        pool.close()
        pool.join()


def test_a_callback_that_raises_stops_nobody(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: said.append(str(args.exc_value)))

    def fail(value: Any) -> None:
        raise SystemExit(f"not {value}")

    with get_context("fork", backend=package).Pool(1) as pool:
        assert pool.apply_async(abs, (-1,), callback=fail).get(30) == 1
        assert pool.map_async(abs, [-2], callback=fail).get(30) == [2]
        with pytest.raises(TypeError):
            pool.apply_async(len, (3,), error_callback=fail).get(30)
        with pytest.raises(TypeError):
            pool.map_async(len, [4], error_callback=fail).get(30)
        assert pool.apply(abs, (-5,)) == 5
        pool.close()
        pool.join()
    error = "object of type 'int' has no len()"
    assert said == ["not 1", "not [2]", f"not {error}", f"not {error}"]


def test_imap_pickles_each_item_when_it_is_drawn(package: str) -> None:
    ctx = get_context("fork", backend=package)
    expected = []

    def draw() -> Any:
        for _ in range(10):
            with socket.socket() as sock:
                expected.append(identity(sock))
                yield sock

    with ctx.Pool(2) as pool:
        assert list(pool.imap(children.identity, draw())) == expected
        pool.close()
        pool.join()


def test_an_iterable_that_fails(package: str) -> None:
    ctx = get_context("fork", backend=package)

    def fail() -> Any:
        yield 1
        raise KeyError("in the iterable")

    with ctx.Pool(1) as pool:
        with pytest.raises(KeyError):
            pool.map(children.same, fail())
        results = pool.imap(children.same, fail())
        assert next(results) == 1
        with pytest.raises(KeyError):
            next(results)
        assert pool.apply(children.same, (1,)) == 1
        pool.close()
        pool.join()


def exit_after(number: int) -> Any:
    yield number
    sys.exit(4)


def end_no_thread(ctx: Any) -> None:
    with ctx.Pool(1) as pool:
        with pytest.raises(SystemExit):
            pool.apply(children.Exits)
        assert pool.apply(children.same, (1,)) == 1
        (worker,) = pool._pool
        for ask in pool.apply, pool.map:
            with pytest.raises(RuntimeError, match="SystemExit"):  # of its worker
                ask(children.same, (children.Exits(),))
        assert pool._pool == [worker]
        for imap in pool.imap, pool.imap_unordered:
            for size in 1, 2:
                results = imap(children.same, [children.ExitsPickled()], size)
                with pytest.raises(SystemExit, match="3"):
                    next(results)
                assert list(results) == []
                with pytest.raises(SystemExit, match="4"):
                    list(imap(children.same, exit_after(2), size))
                assert pool.apply(children.same, (5,)) == 5
        pool.close()
        pool.join()


def test_no_pickle_and_no_iterable_ends_a_thread(package: str) -> None:
    ends(end_no_thread, get_context("fork", backend=package))


def fail_in_the_iterable(ctx: Any) -> None:
    def fail() -> Any:
        yield 1
        raise children.UnloadableError

    with ctx.Pool(1) as pool:
        (worker,) = pool._pool
        results = pool.imap(children.same, fail())
        assert next(results) == 1
        with pytest.raises(RuntimeError, match="exploded"):
            next(results)
        assert pool.apply(children.same, (1,)) == 1
        assert pool._pool == [worker]


def test_an_error_of_an_iterable_that_no_worker_can_load(package: str) -> None:
    ends(fail_in_the_iterable, get_context("fork", backend=package))


@pytest.mark.parametrize("ask", ["apply_async", "map_async", "imap", "initargs"])
def test_peers_see_the_end_when_a_pool_is_terminated(package: str, ask: str) -> None:
    ctx = get_context("fork", backend=package)
    pairs = [socket.socketpair() for _ in range(200)]
    fars = [far for _, far in pairs]
    initargs = (tuple(fars), {}) if ask == "initargs" else ()
    pool = ctx.Pool(1, children.keep if initargs else None, initargs)
    never, go = os.pipe()
    results = [pool.apply_async(os.read, (never, 1))]
    if ask == "apply_async":
        results += [pool.apply_async(children.identity, (far,)) for far in fars]
    elif ask == "map_async":
        results += [pool.map_async(children.identity, fars, 1)]
    elif ask == "imap":
        results += [pool.imap(children.identity, fars)]
    pool.terminate()
    for far in fars:
        far.close()
    # The pool and its results are still there.
    for near, _ in pairs:
        near.setblocking(False)
        with suppress(ConnectionResetError):  # the worker has left a task unread
            assert near.recv(1) == b""
        near.close()
    pool.join()
    os.close(never)
    os.close(go)


@pytest.mark.skipif(sys.platform != "linux", reason="counts of /proc")
def test_the_thread_that_replaces_workers_sleeps_while_jobs_end(package: str) -> None:
    with get_context("fork", backend=package).Pool(1) as pool:
        pool.apply(children.same, (0,))
        thread = pool._worker_handler.native_id
        before = sleeps(thread)
        for number in range(100):  # after each of them no job is left
            pool.apply(children.same, (number,))
        assert sleeps(thread) - before < 50


def sleeps(thread: int) -> int:
    """How often a thread of this process has slept."""
    status = Path(f"/proc/self/task/{thread}/status").read_text()
    return int(status.partition("\nvoluntary_ctxt_switches:")[2].split()[0])


def test_a_closed_pool_ends_with_its_last_job(package: str) -> None:
    reader, writer = os.pipe()
    with get_context("fork", backend=package).Pool(1) as pool:
        last = pool.apply_async(os.read, (reader, 1))
        pool.close()
        wait_until(lambda: not pool._change_notifier._reader.poll())  # the thread has seen that
        os.write(writer, b"!")
        assert last.get(60) == b"!"
        pool._worker_handler.join(60)
        assert not pool._worker_handler.is_alive()
        pool.join()
    os.close(reader)
    os.close(writer)


def test_arguments_of_the_initializer_are_closed_after_join(package: str) -> None:
    near, far = socket.socketpair()
    pool = get_context("fork", backend=package).Pool(1, children.keep, ([far], {}))
    far.close()
    pool.close()
    pool.join()
    near.setblocking(False)
    assert near.recv(1) == b""
    near.close()


@pytest.mark.parametrize("method", METHODS)
def test_exceptions_show_the_workers_lines(method: str, package: str) -> None:
    ctx = get_context(method, backend=package)
    with ctx.Pool(1) as pool:
        with pytest.raises(KeyError) as caught:
            pool.apply(children.raise_key_error)
        names = [entry.name for entry in caught.traceback]
        assert names[-1] == "raise_key_error"
        assert "from the worker" in str(caught.value.__cause__)
        pool.close()
        pool.join()


# The end, with whatever is in it


def fail(pool: Any, ask: str) -> None:
    """A job that fails; the caller's memory, whose end is silent, goes when the caller returns."""
    memory = SharedMemory(1)
    with pytest.raises(RuntimeError):
        if ask == "apply":
            pool.apply(children.explode, (memory,))
        elif ask == "apply_async":
            pool.apply_async(children.explode, (memory,)).get(30)
        else:
            pool.map(children.explode, [memory])
    assert not memory.closed


@pytest.mark.parametrize("ask", ["apply", "apply_async", "map"])
def test_an_exception_keeps_nothing_of_its_callers(package: str, ask: str) -> None:
    """A traceback has the frames that raised, with their locals. Where these had the result, and so
    the exception, all of it stayed until a garbage collection, or for ever (CPython 3.11.2)."""
    with get_context("fork", backend=package).Pool(1) as pool:
        fail(pool, ask)
        wait_until(lambda: not pool._cache, "a quiet moment")
        gc.disable()
        try:
            before = open_now()
            for _ in range(20):
                fail(pool, ask)
            wait_until(lambda: open_now() <= before, "the memory is closed")
        finally:
            gc.enable()


def fill_with_results(pool: Any, function: Any, *args: Any) -> None:
    """Returns when workers wait for room for their results, which the pool does not read: it is
    busy with a callback, until it is told to end."""

    def busy(_: Any) -> None:
        wait_until(lambda: pool._result_handler._state == "TERMINATE")

    channels = pool._outqueue._writer, pool._outqueue._small._writer
    while all(map(writable, channels)):
        pool.apply_async(function, args, callback=busy)


def leave(ctx: Any, function: Any, *args: Any) -> None:
    with ctx.Pool(2) as pool:
        fill_with_results(pool, function, *args)
        workers = [worker.pid for worker in pool._pool]
    assert all(map(ended, workers))


@pytest.mark.parametrize("size", [0, 1000, 100_000, 1 << 20])
def test_leaving_while_results_wait(package: str, size: int) -> None:
    ends(leave, get_context("fork", backend=package), bytes, size)


@pytest.mark.parametrize("method", METHODS)
def test_leaving_while_sockets_wait(package: str, method: str) -> None:
    ends(leave, get_context(method, backend=package), children.many_sockets, 1)


def leave_workers_that_ignore_sigterm(ctx: Any) -> None:
    with ctx.Pool(2, signal.signal, (signal.SIGTERM, signal.SIG_IGN)) as pool:
        fill_with_results(pool, bytes, 1000)


def test_workers_that_ignore_sigterm_end_when_they_wait_for_room(
    package: str, capfd: pytest.CaptureFixture[str]
) -> None:
    ends(leave_workers_that_ignore_sigterm, get_context("fork", backend=package))
    assert capfd.readouterr().err == ""


EXIT = """
    import select, sys, time
    from fdshare import get_context

    def busy(_):
        while pool._result_handler._state == "RUN":
            time.sleep(0.001)

    pool = get_context("fork", backend=sys.argv[1]).Pool(2)
    for _ in range(600):
        pool.apply_async(bytes, (1000,), callback=busy)
    while select.select([], [pool._outqueue._small._writer], [], 0)[1]:
        time.sleep(0.001)
    print("over", flush=True)
"""


def test_a_program_ends_while_results_wait(package: str, child: Any) -> None:
    process = child(EXIT, package)
    assert process.stdout.readline() == "over\n"
    assert process.wait(60) == 0


def leave_while_tasks_wait(ctx: Any, at_limit: bool) -> None:
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # as programs whose output goes through head(1)
    failures: list[Any] = []
    (blocked, other), (reader, writer) = os.pipe(), os.pipe()
    with open(blocked, "rb"), open(other, "wb"), open(reader, "rb") as watched:
        pool = ctx.Pool(1)
        pool.apply_async(os.read, (blocked, 1), error_callback=failures.append)
        with open(writer, "wb") as file:
            for _ in range(800):
                pool.apply_async(children.same, (file,), error_callback=failures.append)
        (worker,) = pool._pool
        wait_until(lambda: not writable(pool._inqueue._writer))
        if at_limit:
            with descriptor_limit_reached():
                pool.terminate()
        else:
            pool.terminate()
        assert ended(worker.pid)
        assert watched.read() == b""  # though the pool is still here
        assert failures == []


@pytest.mark.parametrize("at_limit", [False, True])
def test_leaving_while_tasks_wait(package: str, at_limit: bool) -> None:
    ends(leave_while_tasks_wait, get_context("fork", backend=package), at_limit)


def end_from(ctx: Any, thread: str) -> None:
    pool = ctx.Pool(1)

    def tasks() -> Any:
        yield 1
        pool.terminate()
        yield 2

    if thread == "callback":
        pool.apply_async(children.same, (1,), callback=lambda _: pool.terminate())
    else:
        pool.imap(children.same, tasks())
    pool._worker_handler.join()
    pool._task_handler.join()
    pool._result_handler.join()
    pool.terminate()
    pool.join()


@pytest.mark.parametrize("thread", ["callback", "iterable"])
def test_a_pool_that_is_ended_by_a_thread_of_its_own(
    package: str, thread: str, capfd: pytest.CaptureFixture[str]
) -> None:
    ends(end_from, get_context("fork", backend=package), thread)
    assert capfd.readouterr().err == ""


def idle_workers(pool: Any) -> list[int]:
    """Empty, while one is not idle."""
    pids = [worker.pid for worker in list(pool._pool)]
    return pids if all(state(pid) == "S" for pid in pids) else []


def kill_idle_workers(ctx: Any, count: int) -> None:
    with ctx.Pool(count) as pool:
        for number in range(3):  # who is being killed takes no task, in most cases
            assert pool.apply(children.same, (number,)) == number
            for pid in wait_until(lambda: idle_workers(pool)):
                os.kill(pid, signal.SIGKILL)
        assert pool.apply(children.same, (3,)) == 3
        pool.close()
        pool.join()


def map_without_workers(ctx: Any) -> None:
    with ctx.Pool(1) as pool:
        (worker,) = pool._pool
        with descriptor_limit_reached():  # no worker can be started
            worker.kill()
            wait_until(lambda: not pool._pool)
            results = pool.map_async(children.same, range(10))
        assert results.get() == list(range(10))


def test_a_map_waits_where_no_worker_can_be_started(package: str) -> None:
    ends(map_without_workers, get_context("fork", backend=package))


def kill_a_worker_in_a_task(ctx: Any, count: int) -> None:
    with ctx.Pool(3) as pool, open(os.devnull) as file:
        workers = [worker.pid for worker in pool._pool]
        tasks = pool._inqueue
        data = bytes(1 << 20)
        task = b"".join(framed(data, 1) if count else (LENGTH.pack(len(data)), data))
        socket.send_fds(tasks._writer._carrier(), [task[: 1 << 15]], [file.fileno()] * count)
        tasks._packets._tell(bytes(HEAD_SIZE))
        (reading,) = wait_until(lambda: list(filter(has_flock, workers)))
        wait_until(lambda: tasks._reader._carrier().getsockopt(socket.SOL_SOCKET, MARK) == TORN)
        os.kill(reading, signal.SIGKILL)
        wait_until(lambda: reading not in [worker.pid for worker in pool._pool])
        for _ in pool._pool:
            tasks._packets._tell(bytes(HEAD_SIZE))
        # The rest of the task is no task: nobody reads it, or holds the lock to read it.
        wait_until(lambda: not tasks._packets._reader.poll())
        wait_until(
            lambda: all(
                state(worker.pid) == "S" and not has_flock(worker.pid) for worker in pool._pool
            )
        )


@pytest.mark.skipif(sys.platform != "linux", reason="marks of sockets")
@pytest.mark.parametrize("count", [0, 1])
def test_a_pool_whose_worker_was_killed_in_a_task_can_be_terminated(
    package: str, count: int
) -> None:
    ends(kill_a_worker_in_a_task, get_context("fork", backend=package), count)


@pytest.mark.skipif(sys.platform != "linux", reason="descriptions of a process's own")
@pytest.mark.parametrize(("method", "count"), [("fork", 3), ("spawn", 1), ("forkserver", 1)])
def test_idle_workers_that_are_killed_are_replaced(package: str, method: str, count: int) -> None:
    ends(kill_idle_workers, get_context(method, backend=package), count)


FIRST = """
import resource
from crowding import children
from mp.common import open_now
before = open_now(), children()
failed = 0
with open("/dev/null") as file:
    for most in range(1, 12):
        resource.setrlimit(resource.RLIMIT_NPROC, (most, 100))
        try:
            pool = ctx.Pool(2, repr, (file,))
        except (OSError, RuntimeError) as error:
            assert "RLIMIT_NPROC" in str((error, getattr(error, "__notes__", ""))), error
            failed += 1
        else:
            pool.terminate()
            break
        assert (open_now() - 1, children()) == before, (open_now() - 1, children(), before, error)
print(failed > 1)
"""


@needs_root
@pytest.mark.parametrize("method", METHODS)
def test_no_process_or_thread_can_be_started_by_the_constructor(package: str, method: str) -> None:
    """Workers, threads and descriptors were left where a thread could not be started."""
    output, errors = run_crowded(BEGINS + FIRST, method, package)
    assert output == "True\n"
    assert errors == ""


def test_what_was_sent_is_closed_while_who_sent_it_waits(package: str) -> None:
    """Without the GIL its duplicate was not: whoever read to the end waited for the next task."""
    with get_context("fork", backend=package).Pool(1) as pool:
        for _ in range(5):
            near, far = socket.socketpair()
            with near:
                pool.apply_async(children.close_all, ([near],))
            with far:
                ended = select.poll()
                ended.register(far, select.POLLHUP)
                assert ended.poll(60_000)
