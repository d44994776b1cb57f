"""What each call of sendmsg and recvmsg sends, brings and reports, and that nothing leaks.

The autouse fixture of conftest.py counts this process's descriptors around every test.
"""

from __future__ import annotations

import array
import errno
import gc
import os
import select
import socket
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
from conftest import census
from hanging import HangingFileSystem, needs_fuse
from mp.interrupts import (  # noqa: F401
    Interrupt,
    Interrupter,
    handled_by,
    interrupt,
    make_interrupter,
)

from fdshare.errors import (
    DescriptorLimit,
    DescriptorRefused,
    FdshareError,
    InvalidArgument,
    TooManyDescriptors,
    TruncatedControl,
)
from fdshare.kernel import (
    Credentials,
    Descriptor,
    ancillary,
    close_all,
    enable_credentials,
    recv_fds,
    send_fds,
)
from fdshare.kernel.ancillary import (
    MAX_DESCRIPTORS,
    Look,
    close_looks,
    discard_all,
    look_into,
    numbers_in,
    peek_descriptors,
    read_to_descriptors,
    receive,
    receive_into,
    receive_numbers,
    rights,
    send_all_into,
    send_into,
    send_message,
    truncation,
)
from kernel.pairs import (  # noqa: F401
    Pair,
    Refusing,
    make_file,
    make_pair,
    make_zero,
    open_count,
    run,
)


def test_one_more_than_the_kernel_takes(pair: Pair) -> None:
    with pytest.raises(TooManyDescriptors) as caught:
        send_fds(pair[0], [0] * 254)
    assert (caught.value.count, caught.value.limit) == (254, 253)
    with pytest.raises(TooManyDescriptors):
        send_message(pair[0], [b"x"], [0] * 254)
    # That it is the kernel's limit, and nothing was sent:
    with pytest.raises(OSError) as refused:
        socket.send_fds(pair[0], [b"x"], [0] * 254)
    assert refused.value.errno == errno.EINVAL
    assert not select.select([pair[1]], [], [], 0)[0]


def test_no_data_no_descriptors(pair: Pair) -> None:
    with pytest.raises(InvalidArgument, match="with a byte only"):
        send_fds(pair[0], [0], b"")
    with pytest.raises(InvalidArgument, match="max_bytes"):
        recv_fds(pair[1], 0, 1)
    # The kernel's side of it: accepted, and never delivered.
    assert send_message(pair[0], [b""], [0]) == 0
    assert not select.select([pair[1]], [], [], 0)[0]


@pytest.mark.parametrize("order", [(1, 2, "who"), ("who", 1, 2), (2, "who", 1)], ids=str)
def test_several_rights_messages_and_credentials_in_one(
    pair: Pair, order: tuple[int | str, ...]
) -> None:
    """However the sender split and ordered them, all descriptors are owned."""
    enable_credentials(pair[1])
    who = struct.pack("iII", os.getpid(), os.geteuid(), os.getegid())
    messages = [
        (socket.SOL_SOCKET, socket.SCM_CREDENTIALS, who)
        if part == "who"
        else (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0] * int(part)))
        for part in order
    ]
    pair[0].sendmsg([b"x"], messages)
    with recv_fds(pair[1], 1, 3) as got:
        assert len(got.descriptors) == 3
        assert got.credentials == Credentials(os.getpid(), os.geteuid(), os.getegid())


def test_unknown_control_messages_are_passed_over(pair: Pair) -> None:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with left, right:
        right.setsockopt(socket.SOL_SOCKET, 29, 1)  # SO_TIMESTAMP
        enable_credentials(right)
        send_fds(left, [0, 0], b"x")
        look = right.recvmsg(1, 1000, socket.MSG_PEEK)
        close_looks([look])
        assert {kind for _, kind, _ in look[1]} > {socket.SCM_RIGHTS}
        close_all(peek_descriptors(right, 2))
        with recv_fds(right, 1, 2) as got:
            assert len(got.descriptors) == 2
            assert got.credentials == Credentials(os.getpid(), os.geteuid(), os.getegid())


def test_pidfd_with_a_message(pair: Pair) -> None:
    try:
        pair[1].setsockopt(socket.SOL_SOCKET, 76, 1)  # SO_PASSPIDFD, Linux 6.5
    except OSError:
        pytest.skip("this kernel has no SO_PASSPIDFD")
    send_fds(pair[0], [0], b"x")
    with recv_fds(pair[1], 1, 1) as got:
        assert len(got.descriptors) == 1
        assert got.pidfd is not None
        with open(f"/proc/self/fdinfo/{got.pidfd.fileno()}") as info:
            assert f"Pid:\t{os.getpid()}" in info.read()
    # Where nobody asked for it, it is not left open.
    send_fds(pair[0], [0], b"x")
    _, descriptors, error = receive_into(pair[1], bytearray(1))
    assert error is None
    close_all(descriptors)


def attempt(sock: socket.socket, room: int, flags: int) -> int | FdshareError:
    """How many descriptors arrived, or the error."""
    try:
        got = receive(sock, 1, flags, room)
    except FdshareError as error:
        return error
    got.close()
    return len(got.descriptors)


@pytest.mark.parametrize("room", range(socket.CMSG_SPACE(4 * 4) + 9))
@pytest.mark.parametrize("credentials", [False, True])
def test_a_control_buffer_of_every_size(pair: Pair, room: int, credentials: bool) -> None:
    """All four arrive, or none and an error, and the message can still be looked at first."""
    if credentials:
        enable_credentials(pair[1])
    send_fds(pair[0], [0] * 4, b"x")
    before = open_count()
    with warnings.catch_warnings():
        # CPython warns of credentials that were cut ("improperly-truncated").
        warnings.simplefilter("ignore", RuntimeWarning)
        for flags in (socket.MSG_PEEK, 0):
            result = attempt(pair[1], room, flags)
            assert open_count() == before
            assert result == 4 or (
                isinstance(result, TruncatedControl)
                and result.received < 4
                and room < socket.CMSG_SPACE(4 * 4) + (32 if credentials else 0)
            )
    if not credentials:
        assert (result == 4) == (room >= socket.CMSG_LEN(4 * 4))


def test_truncation_that_raises_in_python_leaks_nothing(pair: Pair) -> None:
    enable_credentials(pair[1])
    before = open_count()
    for room in range(100):
        send_fds(pair[0], [0] * 4, b"x")
        try:
            receive(pair[1], 1, room=room).close()
        except (RuntimeWarning, TruncatedControl):
            pass
        assert open_count() == before


def test_room_for_credentials_is_never_missing(pair: Pair) -> None:
    """With SO_PASSCRED on, a buffer sized for descriptors alone delivers none; ours is not."""
    enable_credentials(pair[1])
    send_fds(pair[0], [0] * 253, b"x")
    close_all(peek_descriptors(pair[1], 253))
    count, descriptors, error = receive_into(pair[1], bytearray(10))
    assert (count, len(descriptors), error) == (1, 253, None)
    close_all(descriptors)
    # The kernel's side of it:
    send_fds(pair[0], [0], b"x")
    _, control, flags, _ = pair[1].recvmsg(1, socket.CMSG_SPACE(4))
    assert flags & socket.MSG_CTRUNC
    assert all(kind != socket.SCM_RIGHTS for _, kind, _ in control)


def test_reading_stops_before_descriptors() -> None:
    """Also where they are behind more than one buffer has room for, and no number is needed."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        buffer = bytearray(1000)
        assert read_to_descriptors(ours, buffer)
        theirs.sendall(bytes(2500))
        assert read_to_descriptors(ours, buffer)
        with pytest.raises(BlockingIOError):
            ours.recv(1, socket.MSG_DONTWAIT)
        theirs.sendall(bytes(2500))
        send_message(theirs, (b"with",), [0, 1])
        theirs.sendall(b"after")
        before = census()
        assert not read_to_descriptors(ours, buffer)
        assert not read_to_descriptors(ours, buffer)
        assert census() == before
        descriptors: list[Descriptor] = []
        while not descriptors:
            _, descriptors, lost = receive_into(ours, buffer)
            assert lost is None
        assert len(descriptors) == 2
        close_all(descriptors)


def test_peek_leaves_the_message(pair: Pair) -> None:
    send_fds(pair[0], [0, 0], b"xy")
    for _ in range(3):
        copies = peek_descriptors(pair[1], 2)
        assert len(copies) == 2
        assert not any(os.get_inheritable(copy.fileno()) for copy in copies)
        close_all(copies)
    with pytest.raises(TooManyDescriptors):
        peek_descriptors(pair[1], 1)
    # Taken without a control buffer, the descriptors are dropped by the kernel.
    assert pair[1].recv(10) == b"xy"


RECEIVING: dict[str, Callable[[socket.socket], list[Descriptor]]] = {
    "receive_into": lambda sock: receive_into(sock, bytearray(10))[1],
    "recv_fds": lambda sock: recv_fds(sock, 10, 3, lossless=False).descriptors,
    "recv_fds, lossless": lambda sock: recv_fds(sock, 10, 3).descriptors,
    "peek_descriptors": lambda sock: peek_descriptors(sock, 3),
}


# Python's own way with an exception in a finaliser: it is dropped, and said to be.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("receiving", RECEIVING)
def test_what_came_is_closed_once_where_a_handler_raises(
    interrupter: Interrupter, receiving: str, count: int
) -> None:
    def get() -> None:
        close_all(RECEIVING[receiving](right))

    before, instructions, over = census(), 1, False
    while not over:
        left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        send_fds(left, [left.fileno()] * count, b"x")
        with handled_by(interrupt), suppress(Interrupt):
            over = not interrupter.arrives(instructions, get)
        instructions += 1
        for end in (left, right):
            end.close()  # EBADF if somebody else has closed its number
        gc.collect()
        assert census() == before


def test_what_was_sent_is_known_whatever_is_raised(pair: Pair, file: Descriptor) -> None:
    left, right = pair
    cell = [0]
    send_into(cell, left, (b"one", b"two"), rights([file.fileno()]))
    assert cell == [6]
    counts: list[int] = []
    big = b"x" * (1 << 20)
    left.settimeout(None)  # with one, Python waits for room by itself
    with pytest.raises(BlockingIOError):
        send_all_into(
            counts, left, ((b"three",), (big,), (b"four",)), ((), (), ()), [socket.MSG_DONTWAIT] * 3
        )
    assert counts[0] == 5
    assert 0 < counts[1] < len(big)
    assert len(counts) == 2
    assert right.recv(6) == b"onetwo"
    assert right.recv(5) == b"three"


@pytest.mark.parametrize("count", [1, 2, MAX_DESCRIPTORS])
def test_a_look_has_the_descriptors(pair: Pair, file: Descriptor, count: int) -> None:
    left, right = pair
    looks: list[Look] = []
    left.send(b"before")
    assert look_into(looks, right, 3) is None
    send_message(left, (b"x",), [file.fileno()] * count)
    right.recv(6)
    assert look_into(looks, right, 1) is None
    assert [look[0] for look in looks] == [b"bef", b"x"]
    assert numbers_in(looks[0]) == []
    numbers = numbers_in(looks[1])
    assert len(numbers) == count
    close_all(map(Descriptor, numbers))


def test_receive_into_reports_instead_of_raising(pair: Pair) -> None:
    send_message(pair[0], [b"ab", b"cd"], [0])
    buffer = bytearray(10)
    count, descriptors, error = receive_into(pair[1], buffer)
    assert (bytes(buffer[:count]), len(descriptors), error) == (b"abcd", 1, None)
    assert not os.get_inheritable(descriptors[0].fileno())
    close_all(descriptors)
    pair[0].close()
    assert receive_into(pair[1], buffer) == (0, [], None)


@pytest.mark.parametrize("count", [1, 2, 253])
@pytest.mark.parametrize("credentials", [False, True])
def test_receive_numbers_gives_them_bare(pair: Pair, count: int, credentials: bool) -> None:
    if credentials:
        enable_credentials(pair[1])
    send_message(pair[0], [b"ab"], [0] * count)
    buffer = bytearray(10)
    size, numbers, error = receive_numbers(pair[1], buffer)
    assert (bytes(buffer[:size]), len(numbers), error) == (b"ab", count, None)
    for number in numbers:
        assert os.path.sameopenfile(number, 0)
        assert not os.get_inheritable(number)
        os.close(number)
    pair[0].close()
    assert receive_numbers(pair[1], buffer) == (0, [], None)


def test_short_send_the_descriptors_are_gone_with_the_first_byte() -> None:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with left, right:
        left.setblocking(False)
        data = b"x" * 5_000_000
        sent = send_message(left, [data], [0])
        assert 0 < sent < len(data)
        with pytest.raises(BlockingIOError):
            send_message(left, [data[sent:]], [0])
        got = receive(right, 100)
        assert len(got.descriptors) == 1
        got.close()
        assert receive(right, 100).descriptors == []


def test_at_the_limit_peek_loses_nothing_and_receive_into_says_so() -> None:
    out = run(
        """
        import os, socket
        from fdshare.kernel.ancillary import peek_descriptors, receive_into, send_message, close_all
        from fdshare.kernel.ancillary import receive_numbers
        from fdshare.errors import DescriptorLimit

        left, right = socket.socketpair()
        for word in (b"one", b"two", b"three"):
            send_message(left, [word], [0, 0, 0])
        taken = hoard(32)
        os.close(taken.pop())
        try:
            peek_descriptors(right, 3)
        except DescriptorLimit as error:
            print(error.errno)
        buffer = bytearray(10)
        count, got, error = receive_into(right, buffer)
        print(bytes(buffer[:count]), got, type(error).__name__)
        count, got, error = receive_numbers(right, buffer)
        print(bytes(buffer[:count]), len(got), type(error).__name__)
        for fd in got:  # what had fitted is the caller's to close
            os.close(fd)
        os.close(os.dup(0))
        for fd in taken[:4]:
            os.close(fd)
        copies = peek_descriptors(right, 3)
        print(len(copies), right.recv(10))
        close_all(copies)
        """
    )
    said = "b'one' [] DescriptorLimit\nb'two' 1 DescriptorLimit\n3 b'three'\n"
    assert out == f"{errno.EMFILE}\n{said}"


# Where a security module refuses a descriptor, there is a number for it.


def test_a_look_at_what_is_refused(pair: Pair, zero: int) -> None:
    send_fds(pair[0], [0, zero, 0], b"x")
    before = open_count()
    looks: list[Look] = []
    with Refusing(pair[1]) as sock:
        assert isinstance(look_into(looks, sock, 1), DescriptorRefused)
        assert len(numbers_in(looks[0])) == 1
        close_looks(looks)
        count, numbers, error = receive_numbers(sock, bytearray(1), socket.MSG_PEEK)
        assert (count, len(numbers)) == (1, 1)
        assert isinstance(error, DescriptorRefused)
        os.close(numbers[0])
        with pytest.raises(DescriptorRefused):
            peek_descriptors(sock, 3)
    assert open_count() == before
    close_all(peek_descriptors(pair[1], 3))  # it is still there


@pytest.mark.parametrize("receive", [receive_into, receive_numbers])
def test_what_is_refused_is_told_after_the_read(pair: Pair, zero: int, receive: Any) -> None:
    send_fds(pair[0], [0, zero, 0], b"x")
    before = open_count()
    with Refusing(pair[1]) as sock:
        count, came, error = receive(sock, bytearray(1))
    assert count == 1
    assert isinstance(error, DescriptorRefused)
    for number in came:
        os.close(number)
    assert open_count() == before


@pytest.mark.parametrize("times", [1, 5])
def test_what_comes_at_another_look_was_not_refused(pair: Pair, zero: int, times: int) -> None:
    """There was no number for it, and another thread has closed one since."""
    send_fds(pair[0], [zero], b"x")
    looks: list[Look] = []
    with Refusing(pair[1], times) as sock:
        assert isinstance(look_into(looks, sock, 1), DescriptorLimit)
        close_looks(looks)
        assert look_into(looks, sock, 1) is None
        close_looks(looks)


@pytest.mark.parametrize("free", [0, 5])
@pytest.mark.parametrize("peeked", [True, False])
def test_a_full_table_in_which_others_close_is_no_refusal(free: int, peeked: bool) -> None:
    """A number is free each time, and never are those that the message takes."""
    run(f"""
        import os, socket
        from fdshare.errors import DescriptorLimit
        from fdshare.kernel import send_fds
        from fdshare.kernel.ancillary import close_looks, look_into, receive_numbers

        class Shared(socket.socket):
            def recvmsg(self, *args):
                got = super().recvmsg(*args)
                os.close(taken.pop())  # another thread
                return got

            def recvmsg_into(self, *args):
                got = super().recvmsg_into(*args)
                os.close(taken.pop())
                return got

        left, right = socket.socketpair()
        send_fds(left, [0] * 40, b"x")
        shared, looks, buffer = Shared(fileno=os.dup(right.fileno())), [], bytearray(1)
        taken = hoard(100)
        for _ in range({free}):
            os.close(taken.pop())
        if {peeked}:
            error = look_into(looks, shared, 1)
        else:
            error = receive_numbers(shared, buffer)[2]
        assert type(error) is DescriptorLimit, error
        shared.close()
    """)


def test_what_another_process_has_read_meanwhile_was_not_refused(pair: Pair, zero: int) -> None:
    send_fds(pair[0], [zero], b"x")
    pair[1].settimeout(None)
    with Refusing(pair[1]) as sock:
        look = sock.recvmsg(1, 100, socket.MSG_PEEK)
        sock.recv(1)
        assert isinstance(truncation(look, sock, 1), DescriptorLimit)


# Where close(2) fails: NFS and FUSE say there what was not written.


@pytest.fixture(name="failing")
def make_failing() -> Iterator[int]:
    """A descriptor that is closed by each close(2), with EDQUOT; so is each copy of it."""
    with HangingFileSystem(0, close_error=errno.EDQUOT) as files:
        fd = files.open_from_outside()
        yield fd
        with pytest.raises(OSError) as caught:
            os.close(fd)
        assert caught.value.errno == errno.EDQUOT


def test_closing_what_nobody_gets_says_nothing_of_its_losses() -> None:
    one, two = (Descriptor(os.open(os.devnull, os.O_RDONLY)) for _ in range(2))
    os.close(one.fileno())  # so its close(2) fails
    discard_all([one, two])
    assert two.closed


@needs_fuse
def test_looks_whose_close_fails(pair: Pair, failing: int) -> None:
    send_fds(pair[0], [failing, 0, failing, 0], b"x")
    before = open_count()
    looks: list[Look] = []
    look_into(looks, pair[1], 1)
    assert open_count() == before + 4
    close_looks(looks)
    assert not looks
    assert open_count() == before


@needs_fuse
def test_what_fitted_and_cannot_be_closed_well(pair: Pair, failing: int) -> None:
    """The error says that descriptors are missing, and what was read is not lost for another."""
    send_fds(pair[0], [failing, 0, failing, 0], b"x")
    before = open_count()
    with pytest.raises(TruncatedControl):
        receive(pair[1], 1, socket.MSG_PEEK, socket.CMSG_SPACE(2 * 4))
    assert open_count() == before
    with pytest.raises(TooManyDescriptors):
        recv_fds(pair[1], 1, 3)
    assert open_count() == before


@needs_fuse
def test_a_message_in_whose_place_a_handler_raises(
    pair: Pair, failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that came with it are closed, whatever close(2) says."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ancillary, "_own", interrupted)
    send_fds(pair[0], [failing, 0, failing, 0], b"x")
    before = open_count()
    with pytest.raises(KeyboardInterrupt):
        receive_into(pair[1], bytearray(1))
    assert open_count() == before
