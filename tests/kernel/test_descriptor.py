"""Descriptor: who closes, and that it is closed exactly once. The kernel is asked."""

from __future__ import annotations

import errno
import gc
import io
import os
import pickle
import resource
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

import pytest
from mp.interrupts import Interrupt, Interrupter, handled_by, interrupt, make_interrupter  # noqa: F401

from fdshare.errors import ClosedDescriptor, UnsupportedKind
from fdshare.kernel import Descriptor, borrow, descriptor
from fdshare.kernel.descriptor import Spare


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


@pytest.fixture
def null() -> int:
    return os.open(os.devnull, os.O_RDONLY)


def test_close_closes_once(null: int) -> None:
    descriptor = Descriptor(null)
    assert descriptor.fileno() == null
    assert not descriptor.closed
    descriptor.close()
    assert descriptor.closed
    assert not is_open(null)
    # Whoever gets the number next must not lose it to a second close.
    again = os.open(os.devnull, os.O_RDONLY)
    assert again == null
    descriptor.close()
    assert is_open(again)
    os.close(again)


def between(call: Callable[[], object], step: int, other: Callable[[], object]) -> None:
    """Makes *call*, and *other* before instruction number *step* of it, as another thread may where
    there is no GIL."""
    left = step

    def trace(frame: FrameType, event: str, _: object) -> Callable[..., Any]:
        nonlocal left
        frame.f_trace_opcodes = frame.f_code.co_filename == descriptor.__file__
        if event == "opcode":
            left -= 1
            if left == 0:
                sys.settrace(None)
                other()
        return trace

    before = sys.gettrace()
    # In Python 3.12 settrace() looks whether any frame was ever told to.
    sys._getframe().f_trace_opcodes = True
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)


@pytest.mark.parametrize("end", [Descriptor.close, Descriptor.detach])
def test_of_two_threads_one_ends_it(end: Callable[[Descriptor], int | None]) -> None:
    """Whoever gets the number next must not lose it."""
    for step in range(1, 100):
        shared = Descriptor(os.open(os.devnull, os.O_RDONLY))
        detached: list[int | None] = []
        others: list[int] = []

        def other() -> None:
            shared.close()  # noqa: B023
            others.append(os.open(os.devnull, os.O_RDONLY))  # noqa: B023

        try:
            between(lambda: detached.append(end(shared)), step, other)  # noqa: B023
        except ClosedDescriptor:
            assert end is Descriptor.detach
        assert shared.closed
        owned = [fd for fd in others + detached if fd is not None]
        assert len({*owned}) == len(owned)
        for fd in owned:
            os.close(fd)
        if not others:
            break
    assert 5 < step < 99


def test_a_handler_that_raises_leaves_it_open_or_closed(interrupter: Interrupter) -> None:
    """It is never open and nobody's."""
    instructions, over = 1, False
    while not over:
        number = os.open(os.devnull, os.O_RDONLY)
        with Descriptor(number) as descriptor:
            with handled_by(interrupt), suppress(Interrupt):
                over = not interrupter.arrives(instructions, descriptor.close)
            assert is_open(number) is not descriptor.closed
        instructions += 1


def test_use_after_close_and_after_detach_say_which(null: int) -> None:
    descriptor = Descriptor(null)
    assert descriptor.detach() == null
    with pytest.raises(ClosedDescriptor, match="detached"):
        descriptor.fileno()
    assert is_open(null)
    closed = Descriptor(null)
    closed.close()
    with pytest.raises(ClosedDescriptor, match="closed"):
        closed.detach()
    with pytest.raises(ValueError, match="closed"):
        closed.dup()


def test_with_closes_even_when_the_body_raises(null: int) -> None:
    with pytest.raises(KeyError), Descriptor(null):
        raise KeyError
    assert not is_open(null)


def test_dropped_it_closes_and_warns(null: int) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        Descriptor(null)
        gc.collect()
    assert not is_open(null)
    assert [str(w.message) for w in seen] == [f"descriptor {null} was never closed"]
    assert seen[0].category is ResourceWarning


def test_dup_of_is_another_number_for_the_same_description(null: int) -> None:
    os.set_inheritable(null, True)
    with Descriptor.dup_of(null) as copy, copy.dup() as second:
        assert len({null, copy.fileno(), second.fileno()}) == 3
        assert not os.get_inheritable(copy.fileno())
        assert os.path.sameopenfile(null, copy.fileno())
        os.close(null)
        assert is_open(copy.fileno())


def test_dup_of_a_number_that_is_not_open(null: int) -> None:
    os.close(null)
    with pytest.raises(ClosedDescriptor, match=f"descriptor {null} is not open"):
        Descriptor.dup_of(null)


def test_dup_of_at_the_limit_is_emfile() -> None:
    code = (
        "import resource\n"
        "from fdshare.kernel import Descriptor\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))\n"
        "try:\n    Descriptor.dup_of(0)\n"
        "except OSError as error:\n    print(error.errno)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == errno.EMFILE
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 3


def test_open_and_socket_take_it_over(null: int) -> None:
    descriptor = Descriptor(null)
    with descriptor.open("rb", buffering=0) as file:
        assert file.fileno() == null
        assert descriptor.closed
    assert not is_open(null)

    left, right = socket.socketpair()
    with left, right:
        taken = Descriptor(os.dup(left.fileno()))
        with taken.socket() as sock:
            assert sock.family == socket.AF_UNIX
            assert taken.closed
            sock.send(b"x")
            assert right.recv(1) == b"x"


def test_an_open_that_fails_leaves_it_owned(null: int) -> None:
    """Builtin open() closes the number where it fails late; the object closed it again later, and
    with it whatever had got the number meanwhile."""
    with Descriptor(null) as descriptor:
        for wrong in ({"encoding": "no such"}, {"mode": "zz"}, {"errors": 7}, {"buffering": 0}):
            with pytest.raises((LookupError, ValueError, TypeError)):
                descriptor.open(**wrong)
            assert not descriptor.closed
            assert is_open(null)


def test_open_may_leave_it_owned(null: int) -> None:
    with Descriptor(null) as descriptor:
        descriptor.open("rb", closefd=False).close()
        assert descriptor.fileno() == null
        assert is_open(null)


def test_socket_of_something_else_leaves_it_owned(null: int) -> None:
    with Descriptor(null) as descriptor:
        with pytest.raises(OSError) as caught:
            descriptor.socket()
        assert caught.value.errno == errno.ENOTSOCK
        assert not descriptor.closed


def test_it_is_not_pickled_as_a_number(null: int) -> None:
    with Descriptor(null) as descriptor, pytest.raises(TypeError, match=r"fdshare\.install"):
        pickle.dumps(descriptor)


def test_repr_tells_the_state(null: int) -> None:
    descriptor = Descriptor(null)
    assert repr(descriptor) == f"<Descriptor fd={null} /dev/null>"
    descriptor.close()
    assert repr(descriptor) == "<Descriptor closed>"
    other = Descriptor(os.open(os.devnull, os.O_RDONLY))
    os.close(other.detach())
    assert repr(other) == "<Descriptor detached>"


def test_borrow_takes_what_has_a_fileno(null: int) -> None:
    with Descriptor(null) as descriptor, open(os.devnull) as file, socket.socket() as sock:
        assert borrow(descriptor) == null
        assert borrow(file) == file.fileno()
        assert borrow(sock) == sock.fileno()
        assert borrow(null) == null


def _closed_socket() -> socket.socket:
    sock = socket.socket()
    sock.close()
    return sock


def _closed_file() -> object:
    file = open(os.devnull)
    file.close()
    return file


class _Claims:
    """Something that says that it has that descriptor."""

    def __init__(self, fd: object) -> None:
        self.fileno = lambda: fd


@pytest.mark.parametrize(
    ("thing", "error"),
    [
        (-1, ClosedDescriptor),
        (2**31, ClosedDescriptor),
        (_Claims(2**31), ClosedDescriptor),
        (_Claims(None), UnsupportedKind),
        (_Claims(3.0), UnsupportedKind),
        (True, ClosedDescriptor),
        (_closed_socket(), ClosedDescriptor),
        (_closed_file(), ClosedDescriptor),
        ("3", UnsupportedKind),
        (None, UnsupportedKind),
        (io.BytesIO(), UnsupportedKind),
    ],
    ids=[
        "negative",
        "large",
        "large-fileno",
        "none-fileno",
        "float-fileno",
        "bool",
        "socket",
        "file",
        "text",
        "none",
        "memory",
    ],
)
def test_borrow_refuses(thing: object, error: type[Exception]) -> None:
    for call in (borrow, Descriptor.dup_of):
        with pytest.raises(error):
            call(thing)  # type: ignore[arg-type]


def test_the_largest_number_may_be_open() -> None:
    assert borrow(2**31 - 1) == 2**31 - 1


def test_the_number_0_is_one_like_any_other() -> None:
    """Standard input is closed, if that is what is asked for."""
    pid = os.fork()
    if not pid:
        try:
            assert Descriptor(0).detach() == 0
            owned = Descriptor(0)
            assert not owned.closed
            owned.close()
            os._exit(1 if os.path.lexists("/proc/self/fd/0") else 0)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_it_is_handed_to_what_is_made_of_it(null: int) -> None:
    descriptor = Descriptor(null)
    with descriptor.hand_to(lambda fd: open(fd, "rb")) as file:
        assert file.fileno() == null
        assert descriptor.closed


def test_it_stays_the_owner_where_nothing_could_be_made(null: int) -> None:
    def refuse(fd: int) -> None:
        raise KeyboardInterrupt

    with Descriptor(null) as descriptor:
        with pytest.raises(KeyboardInterrupt):
            descriptor.hand_to(refuse)
        assert descriptor.fileno() == null
    assert not is_open(null)


def test_a_spare_one_is_closed_without_a_warning(null: int) -> None:
    spare = Spare.dup_of(null)
    number = spare.fileno()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del spare
        gc.collect()
    assert not is_open(number)
    os.close(null)
