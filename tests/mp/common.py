"""What the tests of channels share: the parent's side. (children.py is the other one's.)"""

from __future__ import annotations

import gc
import os
import resource
import select
import signal
import socket
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import Any, Final, TypeAlias

import pytest

from fdshare.kernel import system
from fdshare.mp.channels.receiving import MessageReceiver
from fdshare.mp.channels.sending import Outgoing
from fdshare.mp.pickling.bundle import Arrived, Bundle, Encoded

Pair: TypeAlias = tuple[socket.socket, socket.socket]
Read: TypeAlias = Callable[[socket.socket], bytes | Bundle]

PACKAGES = ("multiprocessing", "multiprocess")
METHODS = ("fork", "spawn", "forkserver")
shares_duplicates = pytest.mark.skipif(
    not system.HAS_GIL, reason="without the GIL each message has duplicates of its own"
)


@pytest.fixture(scope="session", autouse=True)
def trackers() -> None:
    """What multiprocessing starts once for a process, and keeps open, starts before counting."""
    for package in PACKAGES:
        import_module(f"{package}.resource_tracker").ensure_running()
        import_module(f"{package}.forkserver").ensure_running()
        import_module(f"{package}.heap").BufferWrapper(1)


def identity(obj: Any) -> tuple[int, int]:
    """Which file or socket it is."""
    status = os.fstat(obj.fileno())
    return status.st_dev, status.st_ino


def open_now() -> int:
    """How many descriptors this process has."""
    return len(os.listdir("/proc/self/fd"))


def take(receiver: MessageReceiver) -> Any:
    """The next message."""
    while receiver.message is None:
        receiver.fetch()
    message, receiver.message = receiver.message, None
    return message


def read_message(sock: socket.socket) -> Any:
    """As the first message of a process that got *sock*."""
    return take(MessageReceiver(sock, False, None))


def read_expecting(sock: socket.socket) -> Any:
    """As a connection does after messages with descriptors."""
    receiver = MessageReceiver(sock, False, None)
    receiver._in_a_row = 2
    return take(receiver)


def send(sock: socket.socket, message: Encoded) -> None:
    """Sends all of it, without waiting."""
    Outgoing(message).push(sock, socket.MSG_DONTWAIT)


READERS: Final[list[Read]] = [read_message, read_expecting]
# Whatever comes, it makes no difference what was expected.
expecting_or_not = pytest.mark.parametrize("read", READERS)


def received(message: Arrived) -> tuple[bytes, int]:
    """The data, and how many descriptors came; closes them."""
    if isinstance(message, bytes):
        return message, 0
    assert isinstance(message, Bundle)
    count = len(message.owned or ())
    data = bytes(message.data)
    message.close()
    return data, count


def finish(queue: Any) -> None:
    """Closes *queue*, sent or not."""
    queue.close()
    if hasattr(queue, "join_thread"):
        queue.join_thread()
    queue._reader.close()
    queue._writer.close()


def dismiss(workers: list[Any], inbox: Any, outbox: Any) -> None:
    """Tells processes that run `children.echo` to end, which must end well, and closes both."""
    for _ in workers:
        inbox.put(None)
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    finish(inbox)
    finish(outbox)


def writable(connection: Any) -> bool:
    """Whether a sender on *connection* would find room."""
    return bool(select.select([], [connection], [], 0)[1])


def ends(function: Callable[..., object], *args: object, seconds: float = 60) -> None:
    """Run `function(*args)` in a fork of this process, which must end well within *seconds*.

    What hangs there hangs alone: it and its children are killed.
    """
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setpgid(0, 0)
            for package in PACKAGES:  # the fork server is a child of the parent's
                import_module(f"{package}.forkserver")._forkserver._forkserver_pid = None
            function(*args)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    pidfd = os.pidfd_open(pid)
    try:
        ended = select.select([pidfd], [], [], seconds)[0]
    finally:
        os.close(pidfd)
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    assert ended, f"not within {seconds} s"
    assert status == 0


@contextmanager
def descriptor_limit_reached() -> Iterator[None]:
    """No descriptor is free in this process."""
    gc.collect()  # or garbage of before makes room in between
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, os.listdir("/proc/self/fd")))
    fillers = []
    try:
        while not fillers or fillers[-1] < highest:
            fillers.append(os.open(os.devnull, os.O_RDONLY))
        resource.setrlimit(resource.RLIMIT_NOFILE, (fillers[-1] + 1, limits[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for filler in fillers:
            os.close(filler)
