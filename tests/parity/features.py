"""What pools, executors, queues and pipes do besides carrying objects."""

from __future__ import annotations

import concurrent.futures
import os
import queue
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

from parity.columns import Column, outcome, pool_of, result_of


class Unpicklable:
    def __reduce__(self) -> Any:
        raise AttributeError("not to be pickled")


class Bomb:
    def __reduce__(self) -> Any:
        return int, ("no number",)


def square(number: int) -> int:
    return number * number


def add(a: int, b: int) -> int:
    return a + b


def divide(number: int) -> float:
    return 1 / number


def make(cls: Any) -> Any:
    return cls()


def two_then_fail() -> Iterator[int]:
    yield 1
    yield 2
    raise KeyError("the iterable fails")


started: list[Any] = []


def begin(value: Any) -> None:
    started.append(value)


def seen() -> list[Any]:
    return started


def refuse() -> None:
    raise ValueError("the initializer fails")


def own_pid(_: object = None) -> int:
    return os.getpid()


# Pools


def with_pool(use: Callable[[Any], Any], **options: Any) -> Callable[[Column], Any]:
    def run(column: Column) -> Any:
        with pool_of(column, 2, **options) as pool:
            return use(pool)

    return run


def callbacks(pool: Any) -> Any:
    told: list[Any] = []
    good = pool.apply_async(square, (3,), callback=told.append)
    bad = pool.apply_async(divide, (0,), error_callback=lambda e: told.append(type(e).__name__))
    all_of_them = pool.map_async(square, [1, 2], callback=told.append)
    good.wait(), bad.wait(), all_of_them.wait()
    return sorted(map(str, told)), good.successful(), bad.successful()


def not_ready(pool: Any) -> Any:
    result = pool.apply_async(time.sleep, (0.3,))
    try:
        result.successful()
    except ValueError:
        return result.get(timeout=0.01)


def closed_pool(pool: Any) -> Any:
    pool.close()
    pool.apply(square, (1,))


def joined_early(pool: Any) -> Any:
    pool.join()


def ended(pool: Any) -> Any:
    pool.close()
    pool.join()
    return [worker.exitcode for worker in pool._pool]


def terminated(pool: Any) -> Any:
    pool.apply_async(time.sleep, (60,))
    pool.terminate()
    pool.join()
    return [worker.is_alive() for worker in pool._pool]


POOLS: dict[str, Callable[[Column], Any]] = {
    "apply": with_pool(lambda p: p.apply(square, (3,))),
    "apply with keywords": with_pool(lambda p: p.apply(add, (1,), {"b": 2})),
    "apply that raises": with_pool(lambda p: p.apply(divide, (0,))),
    "map": with_pool(lambda p: p.map(square, range(7))),
    "map of nothing": with_pool(lambda p: p.map(square, [])),
    "map in chunks": with_pool(lambda p: p.map(square, range(7), 3)),
    "map that raises": with_pool(lambda p: p.map(divide, [1, 0, 2])),
    "map of a failing iterable": with_pool(lambda p: p.map(square, two_then_fail())),
    "starmap": with_pool(lambda p: p.starmap(add, [(1, 2), (3, 4)])),
    "imap": with_pool(lambda p: list(p.imap(square, range(5)))),
    "imap in chunks": with_pool(lambda p: list(p.imap(square, range(5), 2))),
    "imap that raises": with_pool(lambda p: list(p.imap(divide, [1, 0]))),
    "imap of a failing iterable": with_pool(lambda p: list(p.imap(square, two_then_fail()))),
    "imap without chunks": with_pool(lambda p: p.imap(square, [1], 0)),
    "imap_unordered": with_pool(lambda p: sorted(p.imap_unordered(square, range(5)))),
    "imap with a timeout": with_pool(lambda p: p.imap(time.sleep, [0.3]).next(timeout=0.01)),
    "callbacks": with_pool(callbacks),
    "a result with a timeout": with_pool(not_ready),
    "a closed pool": with_pool(closed_pool),
    "join of an open pool": with_pool(joined_early),
    "close and join": with_pool(ended),
    "terminate": with_pool(terminated),
    "an initializer": with_pool(lambda p: p.apply(seen), initializer=begin, initargs=(5,)),
    "an initializer that is no function": with_pool(len, initializer=5),
    "no workers": lambda column: column.context.Pool(0),
    "maxtasksperchild of 0": lambda column: column.context.Pool(1, maxtasksperchild=0),
    "maxtasksperchild": with_pool(
        lambda p: len(set(p.map(own_pid, range(6), 1))) >= 3, maxtasksperchild=1
    ),
    "a pool in a task": with_pool(lambda p: p.apply(nested, ())),
    "a call that cannot be pickled": with_pool(
        lambda p: result_of(p, p.apply_async(square, (Unpicklable(),)))
    ),
    "a call that cannot be unpickled": with_pool(
        lambda p: pool_goes_on(p, p.apply_async(square, (Bomb(),)))
    ),
    "a result that cannot be pickled": with_pool(
        lambda p: pool_goes_on(p, p.apply_async(make, (Unpicklable,)))
    ),
    "a result that cannot be unpickled": with_pool(
        lambda p: pool_goes_on(p, p.apply_async(make, (Bomb,)))
    ),
    "a pool is not pickled": with_pool(lambda p: p.apply(square, (p,))),
}


def nested() -> Any:
    import multiprocessing

    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(square, (2,))


def pool_goes_on(pool: Any, result: Any) -> str:
    said = outcome(lambda: result_of(pool, result))
    after = outcome(lambda: result_of(pool, pool.apply_async(square, (2,))))
    return f"{said}, then {after}"


# Executors


def with_executor(use: Callable[[Any], Any], **options: Any) -> Callable[[Column], Any]:
    def run(column: Column) -> Any:
        with column.make_executor(1, **options) as executor:
            return use(executor)

    return run


def goes_on(executor: Any, *call: Any) -> str:
    said = outcome(lambda: executor.submit(*call).result())
    after = outcome(lambda: executor.submit(square, 2).result())
    return f"{said}, then {after}"


def shut_down(executor: Any) -> Any:
    executor.shutdown()
    executor.submit(square, 1)


def cancelled(executor: Any) -> Any:
    executor.submit(time.sleep, 0.2)
    futures = [executor.submit(square, number) for number in range(5)]
    executor.shutdown(cancel_futures=True)
    return futures[-1].cancelled(), futures[-1].done()


def told(executor: Any) -> Any:
    heard: list[Any] = []
    future = executor.submit(square, 3)
    future.add_done_callback(lambda done: heard.append(done.result()))
    executor.shutdown()
    return heard


EXECUTORS: dict[str, Callable[[Column], Any]] = {
    "submit": with_executor(lambda e: e.submit(square, 3).result()),
    "submit with keywords": with_executor(lambda e: e.submit(add, 1, b=2).result()),
    "submit without a function": with_executor(lambda e: e.submit()),
    "submit that raises": with_executor(lambda e: type(e.submit(divide, 0).exception()).__name__),
    "map": with_executor(lambda e: list(e.map(square, range(5)))),
    "map in chunks": with_executor(lambda e: list(e.map(square, range(5), chunksize=2))),
    "map without chunks": with_executor(lambda e: e.map(square, [1], chunksize=0)),
    "map that raises": with_executor(lambda e: list(e.map(divide, [1, 0]))),
    "map of a failing iterable": with_executor(lambda e: list(e.map(square, two_then_fail()))),
    "map with a timeout": with_executor(lambda e: list(e.map(time.sleep, [0.3], timeout=0.01))),
    "a result with a timeout": with_executor(lambda e: e.submit(time.sleep, 0.3).result(0.01)),
    "as_completed": with_executor(
        lambda e: [f.result() for f in concurrent.futures.as_completed([e.submit(square, 2)])]
    ),
    "callbacks": with_executor(told),
    "shutdown": with_executor(shut_down),
    "cancel_futures": with_executor(cancelled),
    "an initializer": with_executor(
        lambda e: e.submit(seen).result(), initializer=begin, initargs=(5,)
    ),
    "an initializer that fails": with_executor(
        lambda e: e.submit(square, 1).result(), initializer=refuse
    ),
    "an initializer that is no function": with_executor(len, initializer=5),
    "no workers": lambda column: column.make_executor(0),
    "a worker that ends": with_executor(lambda e: goes_on(e, os._exit, 3)),
    "sys.exit in a task": with_executor(lambda e: goes_on(e, divide, "x")),
    "a call that cannot be pickled": with_executor(lambda e: goes_on(e, square, Unpicklable())),
    "a call that cannot be unpickled": with_executor(lambda e: goes_on(e, square, Bomb())),
    "a result that cannot be pickled": with_executor(lambda e: goes_on(e, make, Unpicklable)),
    "a result that cannot be unpickled": with_executor(lambda e: goes_on(e, make, Bomb)),
}


# What Python 3.14 has brought: an older one says the same in every column.


def drawn(executor: Any) -> Any:
    taken: list[int] = []
    numbers = (taken.append(number) or number for number in range(9))  # type: ignore[func-returns-value]
    results = executor.map(square, numbers, buffersize=3)
    return len(taken), list(results)


def with_all_ended(end: str) -> Callable[[Column], Any]:
    """Ends the workers of an executor in the middle of a task."""

    def run(column: Column) -> Any:
        reader, writer = column.context.Pipe(False)
        with reader, writer:
            executor = column.make_executor(1, initializer=begin_and_say, initargs=(writer,))
            future = executor.submit(time.sleep, 60)
            reader.recv()
            (worker,) = executor._processes.values()
            try:
                getattr(executor, end)()
            except AttributeError:
                worker.kill()
                raise
            worker.join()
            said = outcome(future.result), outcome(lambda: executor.submit(square, 2))
            return worker.exitcode, *said

    return run


def begin_and_say(writer: Any) -> None:
    writer.send("it has begun")


def interrupted(column: Column) -> Any:
    reader, writer = column.context.Pipe(False)
    with reader, writer:
        process = column.context.Process(target=say_interrupt, args=(writer,))
        process.start()
        reader.recv()
        try:
            process.interrupt()
        except AttributeError:
            process.kill()
            raise
        finally:
            process.join()
        return reader.recv(), process.exitcode


def say_interrupt(writer: Any) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        writer.send("ready")
        time.sleep(60)
    except KeyboardInterrupt:
        writer.send("interrupted")


def managed_set(column: Column) -> Any:
    with column.context.Manager() as manager:
        made = manager.set([1, 2])
        made.add(3)
        made |= {4}
        return sorted(made), 2 in made, len(made)


NEW: dict[str, Callable[[Column], Any]] = {
    "map with a buffer": with_executor(drawn),
    "terminate_workers": with_all_ended("terminate_workers"),
    "kill_workers": with_all_ended("kill_workers"),
    "interrupt": interrupted,
    "a managed set": managed_set,
}


# Queues and pipes


def with_queue(kind: str, use: Callable[[Any], Any], *args: Any) -> Callable[[Column], Any]:
    def run(column: Column) -> Any:
        made = getattr(column.context, kind)(*args)
        try:
            return use(made)
        finally:
            made.close()

    return run


def put_get(made: Any) -> Any:
    for each in (1, "text", None, [2]):
        made.put(each)
    return [made.get() for _ in range(4)]


def full(made: Any) -> Any:
    made.put(1)
    try:
        made.put(2, timeout=0.01)
    except queue.Full:
        return made.full(), made.qsize(), made.put_nowait(3)


def closed_queue(made: Any) -> Any:
    made.close()
    made.put(1)


def closed_for_get(made: Any) -> Any:
    made.close()
    made.get_nowait()


def tasks_done(made: Any) -> Any:
    made.put(1)
    made.get()
    made.task_done()
    made.join()
    made.task_done()


def unpicklable_put(made: Any) -> Any:
    made.put(Unpicklable())
    made.put(7)
    return made.get(timeout=20)


def with_pipe(use: Callable[[Any, Any], Any], duplex: bool = True) -> Callable[[Column], Any]:
    def run(column: Column) -> Any:
        ends = column.context.Pipe(duplex)
        try:
            return use(*ends)
        finally:
            for end in ends:
                end.close()

    return run


def sent(a: Any, b: Any) -> Any:
    a.send([1])
    b.send({"k": 2})
    return b.recv(), a.recv(), a.poll(), b.poll(0.01)


def sent_bytes(a: Any, b: Any) -> Any:
    a.send_bytes(b"abcdef", 1, 3)
    b.send_bytes(memoryview(b"xy"))
    room = bytearray(5)
    return b.recv_bytes(), a.recv_bytes_into(room, 2), bytes(room)


def too_long(a: Any, b: Any) -> Any:
    a.send_bytes(b"abcdef")
    return b.recv_bytes(3)


def too_short(a: Any, b: Any) -> Any:
    a.send_bytes(b"abcdef")
    return b.recv_bytes_into(bytearray(3))


def ended_pipe(a: Any, b: Any) -> Any:
    a.send(1)
    a.close()
    return b.recv(), b.poll(), b.recv()


def nobody_reads(a: Any, b: Any) -> Any:
    b.close()
    a.send(1)


def closed_end(a: Any, _: Any) -> Any:
    a.close()
    a.recv()


CHANNELS: dict[str, Callable[[Column], Any]] = {
    "Queue: put and get": with_queue("Queue", put_get),
    "Queue: empty": with_queue("Queue", lambda q: (q.empty(), q.qsize(), q.get(timeout=0.01))),
    "Queue: get_nowait": with_queue("Queue", lambda q: q.get_nowait()),
    "Queue: full": with_queue("Queue", full, 1),
    "Queue: put when closed": with_queue("Queue", closed_queue),
    "Queue: get when closed": with_queue("Queue", closed_for_get),
    "Queue: what cannot be pickled": with_queue("Queue", unpicklable_put),
    "JoinableQueue: too many task_done": with_queue("JoinableQueue", tasks_done),
    "SimpleQueue: put and get": with_queue("SimpleQueue", put_get),
    "SimpleQueue: what cannot be pickled": with_queue("SimpleQueue", unpicklable_put),
    "SimpleQueue: get when closed": with_queue("SimpleQueue", lambda q: (q.close(), q.get())),
    "Pipe: both ways": with_pipe(sent),
    "Pipe: bytes": with_pipe(sent_bytes),
    "Pipe: more bytes than wanted": with_pipe(too_long),
    "Pipe: more bytes than room": with_pipe(too_short),
    "Pipe: bytes that are none": with_pipe(lambda a, _: a.send_bytes("text")),
    "Pipe: a negative offset": with_pipe(lambda a, _: a.send_bytes(b"abc", -1)),
    "Pipe: its end": with_pipe(ended_pipe),
    "Pipe: nobody reads": with_pipe(nobody_reads),
    "Pipe: a closed end": with_pipe(closed_end),
    "Pipe: against its direction": with_pipe(lambda reader, _: reader.send(1), False),
    "Pipe: what cannot be pickled": with_pipe(lambda a, _: a.send(Unpicklable())),
    "Pipe: what cannot be unpickled": with_pipe(lambda a, b: (a.send(Bomb()), b.recv())),
}


def cases(column: Column) -> Iterator[tuple[str, str]]:
    for kind, table in (
        ("pool", POOLS),
        ("executor", EXECUTORS),
        ("new", NEW),
        ("channel", CHANNELS),
    ):
        for name, run in table.items():
            yield f"{kind}, {name}", outcome(lambda run=run: run(column))
