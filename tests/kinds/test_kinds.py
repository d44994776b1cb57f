"""The tables of kinds: which kind an object has, and what the receiver checks."""

from __future__ import annotations

import multiprocessing.connection
import os
import select
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import msgspec
import multiprocess.connection
import pytest
from hanging import ClosedWithError
from hypothesis import given
from hypothesis import strategies as st
from mp.common import open_now
from mp.interrupts import Interrupt, Interrupter, handled_by, interrupt, make_interrupter  # noqa: F401

from fdshare.errors import (
    ClosedDescriptor,
    InvalidArgument,
    KindMismatch,
    UnknownKind,
    UnsupportedKind,
)
from fdshare.kernel.descriptor import Descriptor, Spare
from fdshare.kernel.shared_memory import SharedMemory
from fdshare.kinds import (
    Kind,
    describe,
    is_shareable,
    rebuild,
    rebuilder,
    register_kind,
    unregister_kind,
)
from kinds.common import same_file, through


def test_anything_with_fileno_is_a_descriptor(pipe: tuple[int, int]) -> None:
    epoll = select.epoll()
    pidfd = os.pidfd_open(os.getpid())
    with closing(epoll), Descriptor(pidfd) as process:
        for obj in (epoll, process, pidfd, pipe[0]):
            with through(obj) as other:
                assert type(other) is Descriptor


def test_what_has_no_descriptor_is_refused() -> None:
    for obj in (object(), "name", None, True):
        with pytest.raises((UnsupportedKind, ClosedDescriptor)):
            describe(obj)


def test_is_shareable_means_a_kind_of_its_own() -> None:
    assert is_shareable(socket.socket)
    assert is_shareable(multiprocess.connection.Connection)
    assert not is_shareable(select.epoll)
    assert not is_shareable(int)


def wrong_descriptors(path: Path) -> dict[str, tuple[Any, int]]:
    """A kind of one thing beside a descriptor of another."""
    reader = os.open(path, os.O_RDONLY)
    folder = os.open(path.parent, os.O_RDONLY)
    handle = os.open(path, os.O_PATH)
    with open(path) as file, open(path, "w") as written, socket.socket() as sock:
        kinds = {"file": describe(file)[0], "w": describe(written)[0], "sock": describe(sock)[0]}
    left, right = multiprocessing.Pipe()
    with left, right:
        connection = describe(left)[0]
    udp = socket.socket(type=socket.SOCK_DGRAM).detach()
    unix = socket.socket(socket.AF_UNIX).detach()
    return {
        "socket is a file": (kinds["sock"], reader),
        "stream is a datagram socket": (kinds["sock"], udp),
        "inet is a unix socket": (kinds["sock"], unix),
        "file is a folder": (kinds["file"], folder),
        "file is a path handle": (kinds["file"], handle),
        "writer is read-only": (kinds["w"], os.dup(reader)),
        "connection is a file": (connection, os.dup(reader)),
    }


def test_a_descriptor_of_another_kind_is_refused_and_closed(path: Path) -> None:
    for case, (kind, fd) in wrong_descriptors(path).items():
        with pytest.raises(KindMismatch) as caught:
            rebuild(kind, [Descriptor(fd)])
        assert str(caught.value).count("does not fit") == 1, case
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
            pytest.fail(f"{case}: left open")


@pytest.mark.parametrize("count", [0, 2, 3])
def test_another_number_of_descriptors_is_refused(path: Path, count: int) -> None:
    left, right = multiprocessing.Pipe()
    with left, right, socket.socket() as sock, open(path) as file, Descriptor.dup_of(file) as plain:
        for obj in (left, sock, file, plain):
            descriptors = [Descriptor.dup_of(obj) for _ in range(count)]
            with pytest.raises(KindMismatch):
                rebuild(describe(obj)[0], descriptors)
            assert all(descriptor.closed for descriptor in descriptors)


def test_who_believes_what_a_socket_is_still_looks(path: Path) -> None:
    for case, (kind, fd) in wrong_descriptors(path).items():
        if kind.tag == "socket" and case != "stream is a datagram socket":
            make = rebuilder(kind)
            assert make is not None
            with pytest.raises(KindMismatch):
                make(fd)
        os.close(fd)  # it is still its caller's


@given(st.binary(max_size=40), st.sampled_from(["socket", "file", "connection", "descriptor"]))
def test_any_description_either_rebuilds_or_closes(spec: bytes, tag: str) -> None:
    descriptor = Descriptor(os.open("/dev/null", os.O_RDWR))
    try:
        rebuild(Kind(tag, msgspec.Raw(spec)), [descriptor]).close()
    except (KindMismatch, OSError):
        assert descriptor.closed


def test_the_error_is_not_what_close_says() -> None:
    with pytest.raises(UnknownKind):
        rebuild(Kind("no such tag", msgspec.Raw(b"\xc0")), [ClosedWithError(os.dup(0))])


def test_an_unknown_tag_closes_what_came() -> None:
    descriptor = Descriptor(os.open("/dev/null", os.O_RDWR))
    with pytest.raises(UnknownKind, match="register_kind"):
        rebuild(Kind("nobody's", msgspec.Raw(b"\xc0")), [descriptor])
    assert descriptor.closed


# Your own


class Session:
    def __init__(self, sock: socket.socket, log: Any, user: str) -> None:
        self.sock, self.log, self.user = sock, log, user


class Special(Session):
    pass


@pytest.fixture
def session_kind() -> Iterator[None]:
    def describe_session(session: Session) -> tuple[Any, list[Any]]:
        return {"user": session.user}, [session.sock, session.log]

    def rebuild_session(spec: Any, descriptors: list[Descriptor]) -> Session:
        if spec["user"] == "nobody":
            raise RuntimeError("no such user")
        return Session(descriptors[0].socket(), descriptors[1].open("rb"), spec["user"])

    register_kind(Session, "session", describe_session, rebuild_session)
    yield
    unregister_kind("session")


@pytest.mark.usefixtures("session_kind")
def test_a_kind_of_your_own(path: Path) -> None:
    with socket.socket() as sock, open(path, "rb") as log:
        other = through(Special(sock, log, "ann"))
        assert (type(other), other.user) == (Session, "ann")
        with other.sock, other.log:
            assert same_file(other.sock, sock)
        with pytest.raises(RuntimeError):
            through(Session(sock, log, "nobody"))
        with pytest.raises(InvalidArgument):
            register_kind(int, "session", lambda _: (None, []), lambda _spec, _: 0)


def test_tags_of_fdshare_are_not_yours() -> None:
    for tag in ("socket", ""):
        with pytest.raises(InvalidArgument):
            register_kind(Session, tag, lambda _: (None, []), lambda _spec, _: None)
    with pytest.raises(UnknownKind):
        unregister_kind("socket")


def test_a_class_with_two_tags() -> None:
    """The last one registered describes; the receiver knows both."""

    def tag_of(obj: Session) -> str:
        return describe(obj)[0].tag

    with socket.socket() as sock:
        session = Session(sock, sock, "ann")
        for tag in ("old", "new"):
            register_kind(Session, tag, lambda s: (None, [s.sock]), lambda _, ds: ds[0])
        assert tag_of(session) == "new"
        with pytest.raises(InvalidArgument):
            register_kind(Special, "new", lambda s: (None, [s.sock]), lambda _, ds: ds[0])
        unregister_kind("old")
        assert tag_of(session) == "new"
        register_kind(Session, "old", lambda s: (None, [s.sock]), lambda _, ds: ds[0])
        assert tag_of(session) == "old"
        unregister_kind("old")
        assert tag_of(session) == "new"
        unregister_kind("new")
        with pytest.raises(UnsupportedKind):
            describe(session)


def test_a_kind_of_your_own_may_stand_before_a_built_in_one() -> None:
    register_kind(
        socket.socket, "plain", lambda s: (None, [s]), lambda _, descriptors: descriptors[0]
    )
    try:
        with socket.socket() as sock, through(sock) as other:
            assert type(other) is Descriptor
    finally:
        unregister_kind("plain")
    with socket.socket() as sock, through(sock) as other:
        assert type(other) is socket.socket


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys, fdshare.kinds\n"
        "heavy = {'multiprocessing', 'multiprocess', 'dill', 'numpy', 'ssl', 'tempfile', 'mmap'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def raw_file() -> Any:
    return open(os.devnull, "rb", buffering=0)


def text_file() -> Any:
    return open(os.devnull, "r+", encoding="utf-8")


def connection() -> Any:
    left, right = multiprocessing.connection.Pipe()
    right.close()
    return left


def descriptor() -> Any:
    return Descriptor.dup_of(0)


def memory() -> Any:
    return SharedMemory(1)


@pytest.mark.parametrize(
    "make", [raw_file, text_file, socket.socket, connection, descriptor, memory]
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_each_number_is_closed_once_if_a_handler_raises(
    make: Callable[[], Any], interrupter: Interrupter
) -> None:
    """A second close(2) would fail, or close another thread's descriptor."""
    copies: list[Descriptor] = []
    made: list[Any] = []
    with closing(make()) as obj:
        kind, fds = describe(obj)
        before, instructions, over = open_now(), 1, False
        while not over:
            copies[:] = map(Spare.dup_of, fds)
            with handled_by(interrupt), suppress(Interrupt):
                over = not interrupter.arrives(
                    instructions, lambda: made.extend(map(rebuild, (kind,), (copies,)))
                )
            for one in made:
                one.close()
            made.clear()
            copies.clear()
            assert open_now() == before
            instructions += 1
