"""send_fd, send_err, recv_fd: the textbook's bytes, and what happens when they are wrong."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator

import pytest

from fdshare.errors import (
    ClosedDescriptor,
    DescriptorLimit,
    InvalidArgument,
    ProtocolError,
    RemoteError,
    ServerGone,
)
from fdshare.kernel import (
    Received,
    recv_fd,
    recv_fds,
    s_pipe,
    send_err,
    send_fd,
    send_fds,
)
from kernel.pairs import Pair, run


@pytest.fixture
def pair() -> Iterator[Pair]:
    left, right = s_pipe()
    right.settimeout(20)
    with left, right:
        yield left, right


def test_the_bytes_of_a_descriptor(pair: Pair) -> None:
    send_fd(pair[0], 0)
    with recv_fds(pair[1], 100, 1) as got:
        assert (got.data, len(got.descriptors)) == (b"\0\0", 1)


def test_the_bytes_of_a_refusal(pair: Pair) -> None:
    send_err(pair[0], 13, "not you")
    assert recv_fds(pair[1], 100, 1) == Received(b"not you\0\r", [])


def test_a_descriptor_arrives_close_on_exec(pair: Pair) -> None:
    with open(os.devnull) as file:
        send_fd(pair[0], file)
    with recv_fd(pair[1]) as got:
        assert not os.get_inheritable(got.fileno())
        assert os.path.samestat(os.fstat(got.fileno()), os.stat(os.devnull))


def test_a_refusal_is_a_remote_error(pair: Pair) -> None:
    send_err(pair[0], errno.EACCES, "not you, ünïted")
    with pytest.raises(RemoteError) as caught:
        recv_fd(pair[1])
    assert caught.value.status == caught.value.errno == errno.EACCES
    assert str(caught.value) == "not you, ünïted"
    send_err(pair[0], 255, "")
    with pytest.raises(RemoteError, match="status 255"):
        recv_fd(pair[1])


def test_what_was_said_before_goes_to_on_data(pair: Pair) -> None:
    said: list[bytes] = []
    pair[0].sendall(b"working on it\n")
    send_fd(pair[0], 0)
    recv_fd(pair[1], said.append).close()
    assert b"".join(said) == b"working on it\n"
    said.clear()
    send_err(pair[0], 2, "no such file")
    with pytest.raises(RemoteError, match="no such file"):
        recv_fd(pair[1], said.append)
    assert b"".join(said) == b"no such file"


def test_one_read_takes_one_handover(pair: Pair) -> None:
    """What follows is the next one's, though the kernel merges all of it."""
    send_err(pair[0], 1, "first")
    send_err(pair[0], 2, "second")
    send_fd(pair[0], 0)
    pair[0].sendall(b"and then")
    send_fd(pair[0], 1)
    pair[0].sendall(b"the end")
    for status in (1, 2):
        with pytest.raises(RemoteError) as caught:
            recv_fd(pair[1])
        assert caught.value.status == status
    recv_fd(pair[1]).close()
    recv_fd(pair[1], lambda text: None).close()
    assert pair[1].recv(100) == b"the end"


@pytest.mark.parametrize("status", [0, 7])
def test_split_at_every_byte(status: int) -> None:
    message = b"some words\0" + bytes([status])
    for cut in range(1, len(message)):
        for fd_at in (0, 1):
            left, right = s_pipe()
            with left, right:
                parts = [message[:cut], message[cut:]]
                for index, part in enumerate(parts):
                    send_fds(left, [0] if status == 0 and index == fd_at else [], part)
                if status:
                    with pytest.raises(RemoteError, match="some words"):
                        recv_fd(right)
                else:
                    recv_fd(right).close()


@pytest.mark.parametrize(
    "kind", [socket.SOCK_DGRAM, socket.SOCK_SEQPACKET], ids=["datagram", "seqpacket"]
)
def test_sockets_that_keep_boundaries(kind: int) -> None:
    left, right = socket.socketpair(socket.AF_UNIX, kind)
    with left, right:
        right.settimeout(20)
        send_err(left, 3, "refused")
        send_fds(left, [0], b"words\0\0")
        send_fd(left, 0)
        send_fds(left, [0], b"\0\0too much")
        with pytest.raises(RemoteError):
            recv_fd(right)
        recv_fd(right).close()
        recv_fd(right).close()
        with pytest.raises(ProtocolError, match="8 bytes after the status"):
            recv_fd(right)


@pytest.mark.parametrize(
    ("data", "fds", "error"),
    [
        (b"", 0, ServerGone),
        (b"half a mess", 0, ServerGone),
        (b"half\0", 0, ServerGone),
        (b"half\0", 1, ServerGone),
        (b"\0\0", 0, ProtocolError),
        (b"\0\0", 2, ProtocolError),
        (b"\0\x05", 1, RemoteError),
        (b"\x80\xff\0\x05", 0, RemoteError),
        (b"x" * 100_000 + b"\0\x05", 0, RemoteError),
    ],
)
def test_bad_input(pair: Pair, data: bytes, fds: int, error: type[Exception]) -> None:
    if data:
        send_fds(pair[0], [0] * fds, data)
    pair[0].close()
    with pytest.raises(error):
        recv_fd(pair[1])


def test_more_words_than_anybody_reads_are_dropped(pair: Pair) -> None:
    code = """
        import socket, sys
        from fdshare.kernel import send_err
        with socket.socket(fileno=int(sys.argv[1])) as conn:
            send_err(conn, 1, "x" * 3_000_000)
    """
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(pair[0].fileno())],
        pass_fds=[pair[0].fileno()],
    )
    with pytest.raises(RemoteError) as caught:
        recv_fd(pair[1])
    assert len(str(caught.value)) == 1 << 20
    assert child.wait(20) == 0


def test_on_data_that_raises(pair: Pair) -> None:
    send_fds(pair[0], [0], b"words\0\0")

    def complain(data: bytes) -> None:
        raise KeyError(data)

    with pytest.raises(KeyError):
        recv_fd(pair[1], complain)


@pytest.mark.parametrize("status", [1, 5, 255])
def test_the_status_of_the_textbook_is_negative(pair: Pair, status: int) -> None:
    send_err(pair[0], -status, "no")
    assert recv_fds(pair[1], 100, 1).data == b"no\0" + bytes([status])
    send_err(pair[0], -status, "no")
    with pytest.raises(RemoteError) as caught:
        recv_fd(pair[1])
    assert caught.value.status == status


@pytest.mark.parametrize("status", [0, -256, 256])
def test_a_status_that_is_none(pair: Pair, status: int) -> None:
    with pytest.raises(InvalidArgument, match="status"):
        send_err(pair[0], status, "text")


def test_a_nul_in_the_words_ends_nothing(pair: Pair) -> None:
    send_err(pair[0], 9, "a\0b")
    with pytest.raises(RemoteError, match=r"a\?b") as caught:
        recv_fd(pair[1])
    assert caught.value.status == 9


def test_a_descriptor_that_is_closed(pair: Pair) -> None:
    file = open(os.devnull)
    file.close()
    with pytest.raises(ClosedDescriptor):
        send_fd(pair[0], file)


def test_at_the_limit_it_can_be_read_later() -> None:
    out = run(
        """
        import os
        from fdshare.kernel import recv_fd, s_pipe, send_fd, send_fds
        from fdshare.errors import DescriptorLimit
        left, right = s_pipe()
        left.sendall(b"words")
        send_fd(left, 0)
        taken = hoard(16)
        try:
            recv_fd(right)
        except DescriptorLimit as error:
            print(error)
        os.close(taken.pop())
        with recv_fd(right):
            print("here it is")
        """
    )
    assert out == (
        "RLIMIT_NOFILE of the receiver is 16, all in use; raise it (ulimit -n) or close some\n"
        "here it is\n"
    )
    assert issubclass(DescriptorLimit, OSError)


def test_an_exception_is_sent_as_its_text(pair: Pair) -> None:
    send_err(pair[0], 2, FileNotFoundError(errno.ENOENT, "No such file", "thesis.tex"))
    got = recv_fds(pair[1], 1000, 0)
    assert got.data == b"FileNotFoundError: [Errno 2] No such file: 'thesis.tex'\0\x02"
    send_err(pair[0], 2, KeyError())
    assert recv_fds(pair[1], 1000, 0).data == b"KeyError\0\x02"
