"""What the child processes of these tests do. A module of its own, so that any method finds it."""

from __future__ import annotations

import gc
import os
import resource
import signal
import socket
import sys
from typing import Any


class TwoArguments(Exception):
    """Cannot be unpickled the way exceptions are: its __init__ wants more than `args` holds."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


class Bomb:
    """Cannot be unpickled."""

    def __init__(self, *beside: Any) -> None:
        self.beside = beside

    def __reduce__(self) -> Any:
        return explode, self.beside


class Exits:
    """Ends whoever unpickles it, if that looks for an Exception alone."""

    def __reduce__(self) -> Any:
        return sys.exit, (3,)


class ExitsPickled:
    """The same of whoever pickles it."""

    def __reduce__(self) -> Any:
        sys.exit(3)


class UnloadableError(Exception):
    """Can be pickled, and not be unpickled."""

    def __reduce__(self) -> Any:
        return explode, ()


class Unpicklable:
    def __reduce__(self) -> Any:
        raise AttributeError("not to be pickled")


def explode(*_: Any) -> None:
    raise RuntimeError("it exploded")


def echo(inbox: Any, outbox: Any) -> None:
    """Sends back what arrives, until None does."""
    while (obj := inbox.get()) is not None:
        outbox.put(obj)
        del obj


def echo_connection(connection: Any) -> None:
    while (obj := connection.recv()) is not None:
        connection.send(obj)
        del obj
    connection.close()


def same(obj: Any) -> Any:
    return obj


def first(obj: Any, *beside: Any) -> Any:
    """*obj*; closes the files *beside* it."""
    for other in beside:
        if hasattr(other, "close"):
            other.close()
    return obj


def identity(obj: Any) -> tuple[int, int]:
    """Which file or socket it is, and closes it."""
    status = os.fstat(obj.fileno())
    obj.close()
    return status.st_dev, status.st_ino


def put(queue: Any, *objects: Any) -> None:
    for obj in objects:
        queue.put(obj)


def put_and_die(queue: Any) -> None:
    left, right = socket.socketpair()
    queue.put(left)
    left.close()
    right.send(b"posthumous")
    os.kill(os.getpid(), signal.SIGKILL)


def take_and_die(queue: Any, ready: Any) -> None:
    got = queue.get()
    ready.send(got.fileno() >= 0)
    os.kill(os.getpid(), signal.SIGKILL)


def raise_two_arguments() -> None:
    raise TwoArguments(7, "seven")


def raise_key_error() -> None:
    raise KeyError("from the worker")


def return_bomb() -> Bomb:
    return Bomb(socket.socket())


def many_sockets(count: int) -> list[socket.socket]:
    return [socket.socket() for _ in range(count)]


def count_open() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def limit_descriptors(spare: int) -> None:
    """Leaves this process *spare* free descriptors."""
    taken = set(os.listdir("/proc/self/fd"))
    free = [number for number in range(len(taken) + spare + 1) if str(number) not in taken]
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[spare], free[spare]))


KEPT: list[Any] = []


def keep(*objects: Any) -> None:
    """An initializer."""
    KEPT[:] = objects


def kept(index: int) -> Any:
    return KEPT[index]


def read_kept() -> str:
    sock, box = KEPT
    assert sock.getsockname()
    return str(os.pread(box["file"].fileno(), 5, 0), "ascii")


def flags_of(sock: socket.socket) -> tuple[bool, float | None, bool]:
    """(inheritable, timeout, blocking)."""
    with sock:
        return os.get_inheritable(sock.fileno()), sock.gettimeout(), os.get_blocking(sock.fileno())


def answer(outbox: Any, *objects: Any) -> None:
    """Puts what each is, and closes it."""
    for obj in objects:
        outbox.put(identity(obj))


def say_and_wait(says: int, waits: int) -> None:
    """Writes to the one descriptor that it has begun, and reads the other."""
    os.write(says, b"x")
    os.read(waits, 1)


def close_all(objects: Any) -> None:
    for obj in objects:
        obj.close()


def die_while_sending(half: bytes) -> None:
    """In a worker of an executor: writes *half* of a result, and is killed."""
    frame = sys._getframe()
    while "result_queue" not in frame.f_locals:
        assert frame.f_back is not None
        frame = frame.f_back
    os.write(frame.f_locals["result_queue"]._writer.fileno(), half)
    os.kill(os.getpid(), signal.SIGKILL)
