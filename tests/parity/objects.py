"""Objects that go to a worker of a pool and come back."""

from __future__ import annotations

import collections
import dataclasses
import functools
import io
import os
import pathlib
import select
import selectors
import signal
import socket
import ssl
import subprocess
import tempfile
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing import shared_memory
from typing import Any, NamedTuple

from parity.columns import Column, outcome, pool_of, result_of


@dataclasses.dataclass
class Record:
    sock: Any
    name: str = "record"


@dataclasses.dataclass(frozen=True, slots=True)
class FrozenRecord:
    sock: Any


class Pair(NamedTuple):
    sock: Any
    number: int


class Slotted:
    __slots__ = ("sock",)

    def __init__(self, sock: Any) -> None:
        self.sock = sock


class Derived(socket.socket):
    pass


class Holder:
    def __init__(self, sock: Any) -> None:
        self.sock = sock

    def fileno(self) -> int:
        return int(self.sock.fileno())


class OwnState:
    def __init__(self, sock: Any) -> None:
        self.sock, self.lock = sock, threading.Lock()

    def __getstate__(self) -> Any:
        return {"sock": self.sock}


class Reopened(io.FileIO):
    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path

    def __reduce__(self) -> Any:
        return Reopened, (self.path,)


def connected(timeout: float | None = None) -> socket.socket:
    sock, other = socket.socketpair()
    other.close()
    sock.settimeout(timeout)
    return sock


def closed(obj: Any) -> Any:
    obj.close()
    return obj


def read(mode: str, characters: int, **options: Any) -> Any:
    """A file that has no name any more, at a position."""
    descriptor, path = tempfile.mkstemp()
    with open(descriptor, "wb") as file:
        file.write(b"line one\nline two\nline \xc3\xa9\n" * 50)
    opened = open(path, mode, **options)
    os.unlink(path)
    opened.read(characters)
    return opened


def spooled() -> Any:
    file = tempfile.SpooledTemporaryFile()
    file.write(b"abc")
    return file


def recursive() -> Any:
    made: list[Any] = [connected()]
    made.append(made)
    return made


def registered_selector() -> Any:
    selector = selectors.DefaultSelector()
    selector.register(connected(), 1)
    return selector


def tls() -> Any:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    return context.wrap_socket(
        socket.socket(), do_handshake_on_connect=False, server_hostname="host"
    )


def piped(**options: Any) -> Any:
    process = subprocess.Popen(["true"], stdout=subprocess.PIPE, **options)
    process.wait()
    return process.stdout


OBJECTS: dict[str, Callable[[Column], Any]] = {
    "plain: a number": lambda _: 5,
    "plain: text": lambda _: "text",
    "plain: a path": lambda _: pathlib.Path("/"),
    "plain: a namespace": lambda _: types.SimpleNamespace(a=1),
    "plain: a function": lambda _: len,
    "plain: BytesIO": lambda _: io.BytesIO(b"x"),
    "plain: StringIO": lambda _: io.StringIO("x"),
    "plain: shared_memory": lambda _: shared_memory.SharedMemory(create=True, size=100),
    "plain: a file that reopens itself": lambda _: Reopened("/dev/null"),
    "refused: a lock of threading": lambda _: threading.Lock(),
    "refused: a generator": lambda _: (each for each in ()),
    "refused: poll": lambda _: select.poll(),
    "refused: a selector": lambda _: registered_selector(),
    "refused: a selector without files": lambda _: selectors.DefaultSelector(),
    "refused: a TLS socket": lambda _: tls(),
    "refused: a lock of the context": lambda column: column.context.Lock(),
    "refused: a queue of the context": lambda column: column.context.Queue(),
    "closed: a socket": lambda _: closed(connected()),
    "closed: a file": lambda _: closed(read("rb", 0)),
    "socket: connected": lambda _: connected(),
    "socket: listening": lambda _: socket.create_server(("127.0.0.1", 0)),
    "socket: datagram": lambda _: socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
    "socket: packets": lambda _: socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET),
    "socket with a timeout: none": lambda _: connected(0.0),
    "socket with a timeout: seconds": lambda _: connected(2.5),
    "socket of a derived class": lambda _: Derived(),
    "file: binary": lambda _: read("rb", 5),
    "file: unbuffered": lambda _: read("rb", 5, buffering=0),
    "file: text": lambda _: read("r", 5),
    "file: text to and fro": lambda _: read("r+", 5),
    "file: text without translation": lambda _: read("r", 5, newline=""),
    "file: temporary": lambda _: tempfile.TemporaryFile(),
    "file: with a name": lambda _: tempfile.NamedTemporaryFile(),
    "file: of a pipe": lambda _: piped(),
    "file: text of a pipe": lambda _: piped(text=True),
    "file: of a socket": lambda _: connected().makefile("rb"),
    "file: of a socket, to and fro": lambda _: connected().makefile("rw"),
    "file: spooled": lambda _: spooled(),
    "descriptor: epoll": lambda _: select.epoll(),
    "connection: of the context": lambda column: column.context.Pipe()[0],
    "connection: one way": lambda column: column.context.Pipe(False)[0],
    "inside: a list": lambda _: [connected(), 1],
    "inside: a dict": lambda _: {"key": connected()},
    "inside: a key": lambda _: {connected(): 1},
    "inside: a set": lambda _: {connected(), connected()},
    "inside: a deque": lambda _: collections.deque([connected()]),
    "inside: a defaultdict": lambda _: collections.defaultdict(list, a=[connected()]),
    "inside: a dataclass": lambda _: Record(connected()),
    "inside: a frozen dataclass": lambda _: FrozenRecord(connected()),
    "inside: a named tuple": lambda _: Pair(connected(), 3),
    "inside: slots": lambda _: Slotted(connected()),
    "inside: a namespace": lambda _: types.SimpleNamespace(sock=connected()),
    "inside: an object with fileno": lambda _: Holder(connected()),
    "inside: an object with a state": lambda _: OwnState(connected()),
    "inside: a partial": lambda _: functools.partial(print, connected()),
    "inside: a bound method": lambda _: Holder(connected()).fileno,
    "inside: a recursive list": lambda _: recursive(),
}


def look(obj: Any, depth: int = 0) -> Any:
    """What can be compared of it."""
    name = type(obj).__name__
    if isinstance(obj, socket.socket):
        return name, int(obj.family), int(obj.type), obj.gettimeout(), obj.fileno() >= 0
    if isinstance(obj, io.BytesIO | io.StringIO):
        return name, obj.getvalue()
    if isinstance(obj, io.IOBase):
        return name, obj.tell() if obj.seekable() else None, getattr(obj, "encoding", None)
    if depth > 3 or isinstance(obj, str | int | bytes | None):
        return name, str(obj)
    if isinstance(obj, dict):
        return name, [(look(key, depth + 1), look(obj[key], depth + 1)) for key in obj]
    if isinstance(obj, list | tuple | set | collections.deque):
        return name, [look(each, depth + 1) for each in obj]
    state = {key: value for key, value in getattr(obj, "__dict__", {}).items() if key != "lock"}
    slots = {key: getattr(obj, key) for key in getattr(obj, "__slots__", ()) if hasattr(obj, key)}
    return name, look(state | slots, depth + 1)


def echo(obj: Any) -> Any:
    return look(obj), obj


def there_and_back(pool: Any, obj: Any) -> str:
    before = look(obj) if not getattr(obj, "closed", False) else None
    there, back = result_of(pool, pool.apply_async(echo, (obj,)))
    if before == there == look(back):
        return "arrives"
    return (
        f"arrives as {there[0]}" if there[0] != type(obj).__name__ else "arrives, but not the same"
    )


def cases(column: Column) -> Iterator[tuple[str, str]]:
    """Of each object in a pool; of each file by dill in a process of its own. dill opens the number
    of a nameless file again in the process that it comes back to, and closes what has that number:
    at times it was the listener of multiprocess's resource sharer, whose thread raised for ever."""
    by_dill = column.name == "standard multiprocess"
    alone = [name for name in OBJECTS if by_dill and name.startswith("file: ")]
    for name in alone:
        yield f"object, {name}", in_a_process(column, OBJECTS[name])
    with pool_of(column, 1) as pool:
        for name, make in OBJECTS.items():
            if name not in alone:
                yield f"object, {name}", sent(pool, make(column))


def sent(pool: Any, obj: Any) -> str:
    said = outcome(lambda: there_and_back(pool, obj))
    with suppress(Exception):
        obj.unlink()  # shared memory
    return said


def in_a_process(column: Column, make: Callable[[Column], Any]) -> str:
    near, far = os.pipe()
    pid = os.fork()
    if not pid:
        os.setpgid(0, 0)
        try:
            obj = make(column)
            os.write(far, sent(column.context.Pool(1), obj).encode())
            obj.close()  # which removes the file that has a name
        finally:
            os.killpg(0, signal.SIGKILL)  # and its workers, one of which may wait for ever
    os.close(far)
    with open(near) as report:
        said = report.read()
    os.waitpid(pid, 0)
    return said
