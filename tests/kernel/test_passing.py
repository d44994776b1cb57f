"""send_fds and recv_fds: what arrives, what is refused, and that nothing leaks.

The autouse fixture of conftest.py counts this process's descriptors around every test.
"""

from __future__ import annotations

import errno
import os
import resource
import select
import socket
import subprocess
import sys
import textwrap

import pytest
from conftest import census

from fdshare.errors import (
    AccessDenied,
    ClosedDescriptor,
    DescriptorRefused,
    InvalidArgument,
    MagicMismatch,
    ServerGone,
    TooManyDescriptors,
)
from fdshare.kernel import (
    Credentials,
    Descriptor,
    ancillary,
    enable_credentials,
    own_credentials,
    passing,
    recv_fds,
    send_fds,
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

KINDS = [socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_data_and_descriptors_arrive(kind: int, file: Descriptor) -> None:
    left, right = socket.socketpair(socket.AF_UNIX, kind)
    with left, right:
        send_fds(left, [file, left, 0], b"abc")
        with recv_fds(right, 100, 3) as got:
            assert got.data == b"abc"
            assert got.credentials is None
            assert os.path.sameopenfile(got.descriptors[0].fileno(), file.fileno())
            assert os.path.sameopenfile(got.descriptors[1].fileno(), left.fileno())
            assert not any(os.get_inheritable(d.fileno()) for d in got.descriptors)
        assert all(d.closed for d in got.descriptors)


def test_the_open_file_description_is_shared(pair: Pair, file: Descriptor) -> None:
    send_fds(pair[0], [file])
    with recv_fds(pair[1], 1, 1) as got:
        os.write(file.fileno(), b"12345")
        assert os.lseek(got.descriptors[0].fileno(), 0, os.SEEK_CUR) == 5


def test_bytes_only(pair: Pair) -> None:
    send_fds(pair[0], [], b"plain")
    got = recv_fds(pair[1], 3, 0)
    assert (got.data, got.descriptors) == (b"pla", [])
    assert recv_fds(pair[1], 3, 0).data == b"in"


@pytest.mark.parametrize("count", [252, 253])
def test_as_many_as_the_kernel_takes(pair: Pair, count: int) -> None:
    send_fds(pair[0], [0] * count)
    with recv_fds(pair[1], 1, count) as got:
        assert len(got.descriptors) == count
        assert len({d.fileno() for d in got.descriptors}) == count


def test_more_than_wanted_are_closed_and_counted(pair: Pair) -> None:
    send_fds(pair[0], [0] * 5)
    before = open_count()
    with pytest.raises(TooManyDescriptors) as caught:
        recv_fds(pair[1], 1, 2)
    assert (caught.value.count, caught.value.limit) == (5, 2)
    assert open_count() == before


def test_magic(pair: Pair) -> None:
    send_fds(pair[0], [0], b"\xab")
    recv_fds(pair[1], 1, 1, expect=b"\xab").close()
    send_fds(pair[0], [0], b"\xac")
    before = open_count()
    with pytest.raises(MagicMismatch) as caught:
        recv_fds(pair[1], 1, 1, expect=b"\xab")
    assert (caught.value.expected, caught.value.received) == (b"\xab", b"\xac")
    assert open_count() == before


def test_end_of_stream(pair: Pair) -> None:
    send_fds(pair[0], [0], b"ab")
    pair[0].close()
    with recv_fds(pair[1], 1, 1) as got:
        assert (got.data, len(got.descriptors)) == (b"a", 1)
    # The descriptor went with the first byte.
    assert recv_fds(pair[1], 10, 1).descriptors == []
    assert recv_fds(pair[1], 10, 1).data == b""
    with pytest.raises(ServerGone):
        recv_fds(pair[1], 1, 1, expect=b"\xab")


def test_bytes_before_are_merged_and_bytes_after_are_not(pair: Pair) -> None:
    pair[0].sendall(b"before")
    send_fds(pair[0], [0], b"with")
    pair[0].sendall(b"after")
    with recv_fds(pair[1], 100, 1) as got:
        assert (got.data, len(got.descriptors)) == (b"beforewith", 1)
    assert recv_fds(pair[1], 100, 1).data == b"after"


@pytest.mark.parametrize("lossless", [True, False])
@pytest.mark.parametrize("size", range(1, 14))
def test_a_read_of_any_size_gets_the_descriptors_of_its_own_bytes(
    pair: Pair, size: int, lossless: bool
) -> None:
    """Both ways of reading see the same, though a peek alone looks past the bytes it returns."""
    for data, count in ((b"aaaa", 0), (b"bbb", 1), (b"cc", 2), (b"d", 0), (b"ee", 3)):
        send_fds(pair[0], [0] * count, data)
    pair[0].shutdown(socket.SHUT_WR)
    seen = b""
    descriptors_at = {}
    while got := recv_fds(pair[1], size, 3, lossless=lossless):
        if not got.data:
            break
        if got.descriptors:
            descriptors_at[len(seen)] = len(got.descriptors), len(got.data)
        seen += got.data
        got.close()
    assert seen == b"aaaabbbccdee"
    assert sum(count for count, _ in descriptors_at.values()) == 6
    for start, (count, length) in descriptors_at.items():
        first = {1: 4, 2: 7, 3: 10}[count]  # where the message with that many begins
        assert start <= first < start + length


def test_credentials_are_seen_even_when_the_sender_gave_none(pair: Pair) -> None:
    enable_credentials(pair[1])
    pair[0].sendall(b"x")
    mine = Credentials(os.getpid(), os.geteuid(), os.getegid())
    assert recv_fds(pair[1], 1, 0).credentials == mine
    send_fds(pair[0], [], b"x", credentials=True)
    assert recv_fds(pair[1], 1, 0).credentials == mine
    enable_credentials(pair[1], False)
    pair[0].sendall(b"x")
    assert recv_fds(pair[1], 1, 0).credentials is None


def test_send_fds_sends_all_even_where_the_socket_does_not_block() -> None:
    code = """
        import socket, sys
        sock = socket.socket(fileno=int(sys.argv[1]))
        total = 0
        while data := sock.recv(65536):
            total += len(data)
        print(total)
    """
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with left, right:
        reader = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code), str(right.fileno())],
            pass_fds=[right.fileno()],
            stdout=subprocess.PIPE,
            text=True,
        )
        right.close()
        left.setblocking(False)
        send_fds(left, [0], b"x" * 5_000_000)
        left.close()
        out, _ = reader.communicate(timeout=60)
    assert int(out) == 5_000_000


def test_close_on_exec(pair: Pair, file: Descriptor) -> None:
    send_fds(pair[0], [file])
    with recv_fds(pair[1], 1, 1) as got:
        number = got.descriptors[0].fileno()
        code = f"import os\ntry: print(os.readlink('/proc/self/fd/{number}'))\n"
        code += "except FileNotFoundError: print('none')"
        done = subprocess.run(
            [sys.executable, "-c", code], close_fds=False, capture_output=True, text=True
        )
        assert done.stdout == "none\n"


def test_datagrams_keep_boundaries_and_say_who_sent_them(folder: object) -> None:
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client,
    ):
        server.bind(f"{folder}/server")
        client.bind(f"{folder}/client")
        send_fds(client, [0], b"first", address=f"{folder}/server")
        send_fds(client, [], b"second", address=f"{folder}/server")
        with recv_fds(server, 3, 1) as got:
            assert got.data == b"fir"  # the rest of a datagram is lost, and that is said
            assert got.flags & socket.MSG_TRUNC
            assert got.address == f"{folder}/client"
            send_fds(server, got.descriptors, b"back", address=got.address)
        assert recv_fds(server, 100, 1).data == b"second"
        with recv_fds(client, 100, 1) as answer:
            assert (answer.data, len(answer.descriptors)) == (b"back", 1)


def test_an_empty_datagram_is_no_end() -> None:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with left, right:
        left.send(b"")
        left.send(b"next")
        assert recv_fds(right, 10, 0).data == b""
        assert recv_fds(right, 10, 0).data == b"next"


def test_a_socket_passed_inside_itself() -> None:
    """The kernel's garbage collector frees what only the queue of a dead socket refers to."""
    before = open_count()
    for _ in range(20):
        left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        send_fds(left, [left, right], b"ouroboros")
        send_fds(right, [left, right], b"ouroboros")
        with recv_fds(right, 100, 2) as got:
            with got.descriptors[0].socket() as again:
                again.sendall(b"from inside")
            assert recv_fds(right, 100, 0).data == b"from inside"
        left.close()
        right.close()
    assert open_count() == before


@pytest.mark.parametrize("bad", [10**6, -1])
def test_descriptors_that_are_not_open(pair: Pair, bad: int) -> None:
    with pytest.raises(ClosedDescriptor, match=str(bad)):
        send_fds(pair[0], [0, bad])
    assert not select.select([pair[1]], [], [], 0)[0]


@pytest.mark.usefixtures("no_sigpipe")
def test_a_peer_that_is_gone(pair: Pair) -> None:
    pair[1].close()
    with pytest.raises(BrokenPipeError):
        send_fds(pair[0], [0])
    with pytest.raises(BrokenPipeError):  # it went in the middle of a long message
        passing._send_rest(pair[0], memoryview(b"rest"))


def test_waiting_obeys_the_socket(pair: Pair) -> None:
    pair[1].setblocking(False)
    with pytest.raises(BlockingIOError):
        recv_fds(pair[1], 1, 1)
    pair[1].settimeout(0.001)
    with pytest.raises(TimeoutError):
        recv_fds(pair[1], 1, 1)


@pytest.mark.parametrize("kind", [kind.name for kind in KINDS])
def test_at_the_limit_the_message_stays(kind: str) -> None:
    out = run(
        f"""
        import os, socket
        from fdshare.kernel import recv_fds, send_fds
        from fdshare.errors import DescriptorLimit

        left, right = socket.socketpair(socket.AF_UNIX, socket.{kind})
        send_fds(left, [0, 0, 0], b"precious")
        taken = hoard(32)
        os.close(taken.pop())  # one is free, three are needed
        for _ in range(3):
            try:
                recv_fds(right, 100, 3)
            except DescriptorLimit as error:
                print(error.errno, error.limit, error.whose, len(os.listdir("/proc/self/fd")))
        for fd in (taken.pop(), taken.pop(), taken.pop()):
            os.close(fd)
        with recv_fds(right, 100, 3) as got:
            print(got.data.decode(), len(got.descriptors))
        """
    )
    # listdir's own descriptor is the 32nd
    assert out == f"{errno.EMFILE} 32 receiver 32\n" * 3 + "precious 3\n"


IN_FLIGHT = """
    import os, resource, socket
    from fdshare.kernel import recv_fds, send_fds
    from fdshare.kernel.ancillary import send_message
    from fdshare.errors import DescriptorLimit

    os.setgroups([])
    os.setresgid(61234, 61234, 61234)
    # A uid that nobody else uses: what is in flight is counted for the user, not the process.
    os.setresuid(61234, 61234, 61234)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    left, right = socket.socketpair()
    sent = 0
    try:
        for _ in range(90):
            send_fds(left, [0], b"x")
            sent += 1
    except DescriptorLimit as error:
        print(error.errno, error.limit, error.whose)
        print(error)
    try:
        send_message(left, [b"x"], [0])
    except DescriptorLimit as error:
        print(error.errno)
    arrived = 0
    while arrived < 90:
        with recv_fds(right, 1, 1) as got:
            arrived += len(got.descriptors)
        if sent < 90:
            try:
                send_fds(left, [0], b"x")
                sent += 1
            except DescriptorLimit:
                pass
    print(sent, arrived)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become a user with nothing in flight")
def test_too_many_in_flight_as_an_unprivileged_user() -> None:
    out = run(IN_FLIGHT)
    first, message, again, totals = out.splitlines()
    assert first == f"{errno.ETOOMANYREFS} 64 sender"
    assert "RLIMIT_NOFILE" in message
    assert "in flight" in message
    assert again == str(errno.ETOOMANYREFS)
    assert totals == "90 90"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
@pytest.mark.parametrize(
    "lie",
    ["os.getpid(), 0, os.getgid()", "os.getpid(), os.getuid(), 0", "1, os.getuid(), os.getgid()"],
)
def test_a_lie_is_refused_by_the_kernel(lie: str) -> None:
    out = run(
        f"""
        import os, socket
        from fdshare.kernel import Credentials, recv_fds, send_fds, enable_credentials
        from fdshare.errors import AccessDenied
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
        left, right = socket.socketpair()
        enable_credentials(right)
        try:
            send_fds(left, [0], b"x", credentials=Credentials({lie}))
        except PermissionError as error:
            assert isinstance(error, AccessDenied)
            print(error.errno, error)
        right.setblocking(False)
        try:
            right.recv(1)
        except BlockingIOError:
            print("nothing was sent")
        """
    )
    refused, nothing = out.splitlines()
    assert refused.startswith(f"{errno.EACCES} uid 65534 may not send as")
    assert "CAP_SETUID" in refused
    assert nothing == "nothing was sent"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may name another uid")
def test_a_privileged_sender_may_name_others(pair: Pair) -> None:
    enable_credentials(pair[1])
    send_fds(pair[0], [0], b"x", credentials=Credentials(1, 1234, 5678))
    with recv_fds(pair[1], 1, 1) as got:
        assert got.credentials == Credentials(1, 1234, 5678)


def test_credentials_of_nobody(pair: Pair) -> None:
    me = own_credentials()
    no_pid = Credentials(2**22 + 1, me.uid, me.gid)
    # An unprivileged liar is refused before anybody looks for the pid.
    with pytest.raises(
        (InvalidArgument, AccessDenied), match=r"no process has the pid|CAP_SYS_ADMIN"
    ):
        send_fds(pair[0], [0], b"x", credentials=no_pid)
    with pytest.raises(InvalidArgument, match="no such uid"):
        send_fds(pair[0], [0], b"x", credentials=Credentials(me.pid, 2**32 - 1, me.gid))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
def test_a_child_that_dropped_its_uid_is_seen_with_it(pair: Pair) -> None:
    enable_credentials(pair[1])
    code = """
        import os, socket, sys
        from fdshare.kernel import send_fds
        os.setgroups([])
        os.setresgid(65533, 65533, 65533)
        os.setresuid(65534, 65534, 65534)
        sock = socket.socket(fileno=int(sys.argv[1]))
        send_fds(sock, [0], b"x", credentials=True)
    """
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(pair[0].fileno())],
        pass_fds=[pair[0].fileno()],
    )
    with recv_fds(pair[1], 1, 1) as got:
        assert got.credentials == Credentials(child.pid, 65534, 65533)
    assert child.wait(60) == 0


def test_a_receiver_that_takes_no_descriptors(pair: Pair) -> None:
    try:
        pair[1].setsockopt(socket.SOL_SOCKET, 83, 0)  # SO_PASSRIGHTS, Linux 6.16
    except OSError:
        pytest.skip("this kernel has no SO_PASSRIGHTS")
    with pytest.raises(AccessDenied, match="SO_PASSRIGHTS"):
        send_fds(pair[0], [0])
    send_fds(pair[0], [], b"bytes are welcome")
    assert recv_fds(pair[1], 100, 0).data == b"bytes are welcome"


def test_own_credentials_name_this_process() -> None:
    mine = own_credentials()
    assert (mine.pid, mine.uid, mine.gid) == (os.getpid(), os.geteuid(), os.getegid())
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 253  # what the tests above need


class Raced(socket.socket):
    """A socket from which another thread reads what was just looked at."""

    def recv(self, bufsize: int, flags: int = 0) -> bytes:
        raise BlockingIOError


def test_what_another_reader_took_is_not_ours(null: int) -> None:
    """The copies that looking made are closed."""
    near, far = socket.socketpair()
    with Raced(fileno=near.detach()) as raced, far:
        send_fds(far, [null], b"x")
        before = census()
        with pytest.raises(BlockingIOError):
            recv_fds(raced, 1, 1)
        assert census() == before


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET])
def test_what_a_security_module_refuses_does_not_stay(kind: int, zero: int) -> None:
    left, right = socket.socketpair(socket.AF_UNIX, kind)
    with left, right, Refusing(right) as refusing:
        send_fds(left, [0, zero], b"one")
        send_fds(left, [0], b"two")
        before = open_count()
        with pytest.raises(DescriptorRefused) as caught:
            recv_fds(refusing, 3, 2)
        assert open_count() == before
        assert isinstance(caught.value, PermissionError)
        with recv_fds(refusing, 3, 2) as got:
            assert (got.data, len(got.descriptors)) == (b"two", 1)


def test_what_is_refused_behind_the_bytes_stays(pair: Pair, zero: int) -> None:
    """The look for descriptors goes on to the next message."""
    pair[0].send(b"one")
    send_fds(pair[0], [zero], b"two")
    with Refusing(pair[1]) as refusing:
        with recv_fds(refusing, 3, 1) as got:
            assert (got.data, got.descriptors) == (b"one", [])
        with pytest.raises(DescriptorRefused):
            recv_fds(refusing, 3, 1)


def test_what_is_refused_with_few_numbers_free_is_gone(
    pair: Pair, zero: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ancillary, "_are_free", lambda _, count: count == 1)
    send_fds(pair[0], [zero], b"x")
    pair[0].close()
    with Refusing(pair[1]) as refusing:
        with pytest.raises(DescriptorRefused):
            recv_fds(refusing, 1, 1)
        assert not refusing.recv(1)
