"""Each kind, and each trap of its: what arrives is the same thing, at the same place."""

from __future__ import annotations

import io
import multiprocessing.connection
import os
import select
import socket
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import multiprocess.connection
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdshare.errors import (
    ClosedDescriptor,
    InvalidArgument,
    KindMismatch,
    UnknownKind,
    UnreadData,
    UnsupportedKind,
)
from fdshare.kernel.descriptor import Descriptor
from fdshare.kinds import (
    Kind,
    describe,
    is_shareable,
    rebuild,
    rebuilder,
    register_kind,
    unregister_kind,
)
from fdshare.kinds.files import newline_of


def through(obj: Any) -> Any:
    """*obj* described, its descriptors duplicated as the kernel would, and rebuilt."""
    kind, fds = describe(obj)
    wire = msgspec.msgpack.encode(kind)
    return rebuild(
        msgspec.msgpack.decode(wire, type=Kind), [Descriptor.dup_of(number) for number in fds]
    )


def same_file(a: Any, b: Any) -> bool:
    return os.path.samestat(os.fstat(a.fileno()), os.fstat(b.fileno()))


@pytest.fixture
def path(folder: Path) -> Path:
    path = folder / "data"
    path.write_bytes(b"".join(b"line %d\n" % n for n in range(2000)))
    return path


# Sockets

SOCKETS: dict[str, Callable[[], socket.socket]] = {
    "tcp": lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM),
    "tcp6": lambda: socket.socket(socket.AF_INET6, socket.SOCK_STREAM),
    "udp": lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
    "unix": lambda: socket.socket(socket.AF_UNIX, socket.SOCK_STREAM),
    "unix-datagram": lambda: socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM),
    "unix-seqpacket": lambda: socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET),
    "listener": lambda: socket.create_server(("127.0.0.1", 0)),
}


@pytest.mark.parametrize("timeout", [None, 0.0, 2.5])
@pytest.mark.parametrize("make", SOCKETS.values(), ids=SOCKETS)
def test_a_socket_of_any_family_and_type(
    make: Callable[[], socket.socket], timeout: float | None
) -> None:
    with make() as sock:
        sock.settimeout(timeout)
        with through(sock) as other:
            assert type(other) is socket.socket
            assert same_file(sock, other)
            assert (other.family, other.type) == (sock.family, sock.type)
            assert other.gettimeout() == timeout
            assert os.get_blocking(other.fileno()) is (timeout is None)
            assert not os.get_inheritable(other.fileno())


def test_a_socket_ignores_the_default_timeout_of_the_receiver() -> None:
    with socket.socket() as sock:
        kind, fds = describe(sock)
        socket.setdefaulttimeout(7)
        try:
            with rebuild(kind, [Descriptor.dup_of(fds[0])]) as other:
                assert other.gettimeout() is None
                assert os.get_blocking(sock.fileno())
        finally:
            socket.setdefaulttimeout(None)


def test_a_socket_subclass_becomes_a_socket() -> None:
    class Mine(socket.socket):
        pass

    with Mine() as sock, through(sock) as other:
        assert type(other) is socket.socket


def test_a_tls_socket_is_refused() -> None:
    context = ssl.create_default_context()
    with socket.socket() as sock:
        tls = context.wrap_socket(sock, server_hostname="x", do_handshake_on_connect=False)
        with tls, pytest.raises(UnsupportedKind, match="before wrapping"):
            describe(tls)


def test_a_closed_socket_is_an_error() -> None:
    sock = socket.socket()
    sock.close()
    with pytest.raises(ClosedDescriptor):
        describe(sock)


# Files

OPENED: dict[str, tuple[str, dict[str, Any]]] = {
    "raw": ("rb", {"buffering": 0}),
    "raw-random": ("r+b", {"buffering": 0}),
    "reader": ("rb", {}),
    "writer": ("wb", {}),
    "random": ("r+b", {}),
    "append": ("ab", {}),
    "append-random": ("a+b", {}),
    "text": ("r", {"encoding": "utf-8"}),
    "text-write": ("w", {"encoding": "latin-1", "errors": "replace"}),
    "text-random": ("r+", {"encoding": "utf-8", "newline": ""}),
    "text-append": ("a", {"encoding": "utf-8", "newline": "\r\n"}),
    "text-line-buffered": ("w", {"encoding": "utf-8", "buffering": 1}),
}


@pytest.mark.parametrize(("mode", "options"), OPENED.values(), ids=OPENED)
def test_a_file_keeps_class_mode_and_text_settings(
    path: Path, mode: str, options: dict[str, Any]
) -> None:
    with open(path, mode, **options) as file, through(file) as other:
        assert type(other) is type(file)
        assert other.mode == file.mode
        assert same_file(file, other)
        assert other.name == str(path)
        assert not os.get_inheritable(other.fileno())
        if isinstance(file, io.TextIOWrapper):
            assert other.encoding == file.encoding
            assert other.errors == file.errors
            assert other.line_buffering == file.line_buffering
            assert other.write_through == file.write_through
            assert newline_of(other) == options.get("newline")


@pytest.mark.parametrize("mode", ["r", "rb", "r+", "r+b"])
def test_a_reader_is_where_tell_says(path: Path, mode: str) -> None:
    with open(path, mode) as file:
        file.readline()
        file.readline()
        with through(file) as other:
            assert other.tell() == file.tell() == 14
            assert other.readline() in ("line 2\n", b"line 2\n")
        # One offset for both: the sender goes on where the receiver's buffer ended.
        assert file.seek(0) == 0
        assert file.readline() in ("line 0\n", b"line 0\n")


def test_a_writer_is_flushed(path: Path) -> None:
    with open(path, "w") as file:
        file.write("first ")
        with through(file) as other:
            other.write("second")
        assert path.read_text() == "first second"


def test_a_random_file_written_and_read(path: Path) -> None:
    with open(path, "r+b") as file:
        file.readline()
        file.write(b"LINE")
        with through(file) as other:
            assert other.read(3) == b" 1\n"
    assert path.read_bytes().startswith(b"line 0\nLINE 1\n")


def test_an_appending_file_keeps_its_position(path: Path) -> None:
    with open(path, "a+b") as file:
        file.seek(7)
        with through(file) as other:
            assert other.tell() == 7
            assert file.tell() == 7


def test_an_unlinked_file_and_a_renamed_one(path: Path) -> None:
    with open(path) as file:
        path.unlink()
        path.write_text("somebody else's")
        with through(file) as other:
            assert other.readline() == "line 0\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "shift_jis", "utf-7"])
def test_text_in_the_middle_of_a_stateful_encoding(folder: Path, encoding: str) -> None:
    path = folder / "text"
    path.write_text("あいう\nえおa\nbcか\n" * 50, encoding=encoding)
    with open(path, encoding=encoding) as file:
        file.readline()
        file.read(2)
        with through(file) as other:
            assert other.read(5) == "a\nbcか"


@given(
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=300),
    st.integers(0, 300),
    st.sampled_from([None, "", "\n", "\r", "\r\n"]),
    st.sampled_from(["utf-8", "utf-16", "utf-8-sig"]),
)
def test_any_text_is_continued_where_it_was_left(
    content: str, position: int, newline: str | None, encoding: str
) -> None:
    with tempfile.TemporaryFile("w+b") as plain:
        plain.write(content.encode(encoding))
        plain.seek(0)
        file = io.TextIOWrapper(plain, encoding=encoding, newline=newline)
        expected = file.read()
        file.seek(0)
        head = file.read(position)
        with through(file) as other:
            assert head + other.read() == expected
        file.detach()


def test_iterating_leaves_no_known_position(path: Path) -> None:
    with open(path) as file:
        next(file)
        with pytest.raises(UnsupportedKind, match="readline"):
            describe(file)


@pytest.mark.parametrize("newline", [None, "", "\n", "\r", "\r\n"])
def test_newline_is_known(newline: str | None) -> None:
    with tempfile.TemporaryFile("w+", newline=newline) as file:
        assert newline_of(file.file if hasattr(file, "file") else file) == newline
        with through(file) as other:
            assert newline_of(other) == newline


# Pipes


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        try:
            os.close(end)
        except OSError:
            pass


@pytest.mark.parametrize("mode", ["r", "rb"])
def test_read_ahead_of_a_pipe_is_an_error_with_the_count(pipe: tuple[int, int], mode: str) -> None:
    os.write(pipe[1], b"one\ntwo\n")
    with open(pipe[0], mode, closefd=False) as file:
        file.readline()
        for _ in range(2):
            with pytest.raises(UnreadData) as refusal:
                describe(file)
            assert refusal.value.count == 4
        assert file.readline() in ("two\n", b"two\n")
        with through(file) as other:
            os.write(pipe[1], b"three\n")
            assert other.readline() in ("three\n", b"three\n")


def test_refused_read_ahead_is_there_for_read_all(pipe: tuple[int, int]) -> None:
    os.write(pipe[1], b"one\ntwo\nthr")
    with open(pipe[0], closefd=False) as file:
        file.readline()
        with pytest.raises(UnreadData):
            describe(file)
        os.write(pipe[1], b"ee")
        os.close(pipe[1])
        assert file.read() == "two\nthree"


def test_an_empty_pipe_is_not_read(pipe: tuple[int, int]) -> None:
    with open(pipe[0], closefd=False) as reader, through(reader) as reader2:
        with open(pipe[1], "w", closefd=False) as writer, through(writer) as writer2:
            print("hello", file=writer2, flush=True)
        assert reader2.readline() == "hello\n"


@pytest.mark.parametrize("mode", ["r", "rb", "w", "wb", "rw", "rwb"])
def test_files_of_makefile_bring_their_socket(mode: str) -> None:
    near, far = socket.socketpair()
    with far:
        near.settimeout(5)
        file = near.makefile(mode)
        near.close()
        with file, through(file) as other:
            assert type(other) is type(file)
            if "w" in mode:
                other.write(b"out" if "b" in mode else "out")
                other.flush()
                assert far.recv(9) == b"out"
            if "r" in mode:
                far.send(b"in\n")
                assert other.readline() in ("in\n", b"in\n")


def test_a_pair_of_two_descriptors() -> None:
    (r1, w1), (r2, w2) = os.pipe(), os.pipe()
    pair = io.BufferedRWPair(io.FileIO(r1, "r"), io.FileIO(w2, "w"))
    with pair, through(pair) as other:
        other.write(b"there")
        other.flush()
        assert os.read(r2, 9) == b"there"
        os.write(w1, b"back")
        os.close(w1)
        assert other.read() == b"back"
    os.close(r2)


# Temporary files


def test_a_temporary_file_stays_with_its_creator() -> None:
    with tempfile.NamedTemporaryFile("w+") as file:
        file.write("x")
        with through(file) as other:
            assert type(other) is io.TextIOWrapper
            assert other.name == file.name
        assert os.path.exists(file.name)


def test_a_spooled_file_leaves_memory() -> None:
    with tempfile.SpooledTemporaryFile(mode="w+b") as file:
        file.write(b"abc")
        file.seek(1)
        with through(file) as other:
            assert other.read() == b"bc"


def test_a_file_in_memory_is_refused() -> None:
    for file in (io.BytesIO(), io.TextIOWrapper(io.BytesIO()), io.BufferedReader(io.BytesIO())):
        with pytest.raises(UnsupportedKind):
            describe(file)


def test_a_closed_file_is_an_error(path: Path) -> None:
    file = open(path)
    file.close()
    with pytest.raises(ClosedDescriptor):
        describe(file)


# Connections


@pytest.mark.parametrize("duplex", [True, False])
@pytest.mark.parametrize("module", [multiprocessing, multiprocess], ids=lambda m: m.__name__)
def test_a_connection_of_either_family(module: Any, duplex: bool) -> None:
    reader, writer = module.connection.Pipe(duplex)
    with reader, writer, through(reader) as reader2, through(writer) as writer2:
        assert type(reader2) is type(reader)
        assert (reader2.readable, reader2.writable) == (reader.readable, reader.writable)
        writer2.send({"a": 1})
        assert reader2.recv() == {"a": 1}


# Descriptors


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


# What the receiver checks


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
        with pytest.raises((KindMismatch, IsADirectoryError)):
            rebuild(kind, [Descriptor(fd)])
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
            with pytest.raises(KindMismatch):
                rebuilder(kind)(fd)
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(fd)
                pytest.fail(f"{case}: left open")
        else:
            os.close(fd)


@pytest.mark.parametrize(
    ("proto", "timeout"), [(1 << 40, None), (0, -1.0), (0, 1e300), (0, float("nan"))]
)
def test_numbers_that_no_socket_has(proto: int, timeout: float | None) -> None:
    with socket.socket() as sock:
        spec = [int(sock.family), int(sock.type), proto, timeout]
        copy = Descriptor.dup_of(sock)
        fd = copy.fileno()
        with pytest.raises(KindMismatch):
            rebuild(Kind("socket", msgspec.Raw(msgspec.msgpack.encode(spec))), [copy])
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


@given(st.binary(max_size=40), st.sampled_from(["socket", "file", "connection", "descriptor"]))
def test_any_description_either_rebuilds_or_closes(spec: bytes, tag: str) -> None:
    descriptor = Descriptor(os.open("/dev/null", os.O_RDWR))
    try:
        rebuild(Kind(tag, msgspec.Raw(spec)), [descriptor]).close()
    except (KindMismatch, OSError):
        assert descriptor.closed


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
        "heavy = {'multiprocessing', 'multiprocess', 'dill', 'numpy', 'ssl', 'tempfile'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
