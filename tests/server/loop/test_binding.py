"""binding: what `bind` makes, and every way in which it refuses."""

from __future__ import annotations

import errno
import grp
import os
import resource
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from fdshare.errors import (
    AddressInUse,
    DescriptorLimit,
    EndpointError,
    InvalidArgument,
)
from fdshare.server.loop.binding import bind_address, is_reached
from fdshare.server.loop.inspect import describe_descriptor


def bind(
    address: str, backlog: int = 16, reuse_port: bool = False, find_owner: bool = True
) -> socket.socket:
    return bind_address(address, backlog=backlog, reuse_port=reuse_port, find_owner=find_owner)


def listens(sock: socket.socket) -> bool:
    return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


@pytest.fixture
def stale(folder: Path) -> Path:
    """The socket file of a listener that is gone."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(folder / "s"))
        sock.listen()
    return folder / "s"


# Network.


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
def test_tcp_listens_and_blocks(host: str) -> None:
    with bind(f"tcp://{host}:0") as listener:
        assert listens(listener)
        assert listener.getblocking()
        assert not listener.get_inheritable()
        assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)
        with socket.create_connection(("127.0.0.1", listener.getsockname()[1])):
            listener.accept()[0].close()


def test_one_socket_for_both() -> None:
    try:
        listener = bind("tcp://*:0")
    except EndpointError as error:
        pytest.skip(str(error))
    with listener:
        port = listener.getsockname()[1]
        assert describe_descriptor(listener.fileno()).local == f"*:{port}"
        for host in ("127.0.0.1", "::1"):
            with socket.create_connection((host, port)):
                listener.accept()[0].close()
        with pytest.raises(AddressInUse) as caught:
            bind(f"tcp://0.0.0.0:{port}")
        assert caught.value.pid == os.getpid()
        with pytest.raises(AddressInUse):
            bind(f"tcp://*:{port}")


def test_ipv6_is_ipv6_alone() -> None:
    try:
        listener = bind("tcp://[::]:0")
    except EndpointError as error:
        pytest.skip(str(error))
    with listener:
        port = listener.getsockname()[1]
        with bind(f"tcp://0.0.0.0:{port}") as other:
            assert other.getsockname()[1] == port


def test_udp() -> None:
    with bind("udp://127.0.0.1:0") as sock:
        assert sock.type == socket.SOCK_DGRAM
        with pytest.raises(AddressInUse) as caught:
            bind(f"udp://127.0.0.1:{sock.getsockname()[1]}")
        assert caught.value.errno == errno.EADDRINUSE


def test_a_port_that_we_have_ourselves() -> None:
    with bind("tcp://127.0.0.1:0") as listener:
        address = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(AddressInUse) as caught:
            bind(address)
    assert caught.value.address == address
    if sys.platform == "linux":
        assert caught.value.pid == os.getpid()
        assert "this server itself" in str(caught.value)


def test_whose_a_port_is_need_not_be_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with bind("tcp://127.0.0.1:0") as listener:
        monkeypatch.setattr(os, "listdir", None)
        monkeypatch.setattr(os, "scandir", None)
        with pytest.raises(AddressInUse, match="another socket has it") as caught:
            bind(f"tcp://127.0.0.1:{listener.getsockname()[1]}", find_owner=False)
        assert caught.value.pid is None


OTHER = """
import socket, sys
with socket.socket(socket.AF_INET) as listener:
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    print(listener.getsockname()[1], flush=True)
    input()
"""


def test_a_port_that_another_has() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", OTHER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        port = int(child.stdout.readline())
        with pytest.raises(AddressInUse) as caught:
            bind(f"tcp://127.0.0.1:{port}")
        child.communicate("\n", timeout=30)
    assert caught.value.pid in (child.pid, None)
    assert f"uid {os.geteuid()}" in str(caught.value) or sys.platform != "linux"


def test_a_port_in_time_wait_can_be_had() -> None:
    with bind("tcp://127.0.0.1:0") as listener:
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            accepted, _ = listener.accept()
            accepted.close()  # the side that closes first keeps the port in TIME_WAIT
            assert client.recv(1) == b""
    bind(f"tcp://127.0.0.1:{port}").close()


@pytest.mark.parametrize("scheme", ["tcp", "udp"])
def test_a_shared_port(scheme: str) -> None:
    with bind(f"{scheme}://127.0.0.1:0", reuse_port=True) as one:
        port = one.getsockname()[1]
        with bind(f"{scheme}://127.0.0.1:{port}", reuse_port=True) as other:
            assert other.getsockname() == one.getsockname()


@pytest.mark.parametrize(
    ("address", "code", "says"),
    [
        ("tcp://192.0.2.1:0", errno.EADDRNOTAVAIL, "no address 192.0.2.1"),
        ("tcp://[fe80::1%nosuch]:0", None, ""),
        ("tcp://[fe80::1%4294967296]:0", errno.ENODEV, ""),
        ("udp://[fe80::1%²]:0", None, ""),
    ],
)
def test_an_address_that_is_not_ours(address: str, code: int | None, says: str) -> None:
    with pytest.raises(EndpointError) as caught:
        bind(address)
    assert caught.value.address == address
    assert code is None or caught.value.errno == code
    assert says in str(caught.value)


LOW_PORT = """
import os
from fdshare.errors import EndpointError
from fdshare.server.loop.binding import bind_address
os.setgid(65534); os.setuid(65534)
try:
    bind_address("tcp://127.0.0.1:1", backlog=1, reuse_port=False)
except EndpointError as error:
    print(error)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_a_port_that_is_privileged() -> None:
    try:
        first = int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text())
    except OSError:
        first = 1024
    if first < 2:
        pytest.skip("no port is privileged here")
    run = [sys.executable, "-c", LOW_PORT]
    done = subprocess.run(run, capture_output=True, text=True, timeout=60)
    assert "CAP_NET_BIND_SERVICE" in done.stdout, done.stderr


# UNIX.


def test_a_path(folder: Path) -> None:
    with bind(f"unix://{folder}/s", backlog=3) as listener:
        assert listens(listener)
        assert listener.getblocking()
        assert stat.S_IMODE((folder / "s").stat().st_mode) == 0o600
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(folder / "s"))
    assert os.listdir(folder) == ["s"]  # no lock is left beside it


@pytest.mark.parametrize("mode", ["0660", "666", "0600"])
def test_a_path_with_a_mode(folder: Path, mode: str) -> None:
    before = os.umask(0o077)
    try:
        bind(f"unix://{folder}/s?mode={mode}").close()
    finally:
        os.umask(before)
    assert stat.S_IMODE((folder / "s").stat().st_mode) == int(mode, 8)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives a file to any group")
def test_a_path_with_a_group(folder: Path) -> None:
    before = os.umask(0o077)
    try:
        bind(f"unix://{folder}/s?mode=0660&group=12345").close()
        bind(f"unix://{folder}/t?group={grp.getgrgid(0).gr_name}").close()
    finally:
        os.umask(before)
    info = (folder / "s").stat()
    assert (stat.S_IMODE(info.st_mode), info.st_uid, info.st_gid) == (0o660, os.geteuid(), 12345)
    info = (folder / "t").stat()
    assert (stat.S_IMODE(info.st_mode), info.st_gid) == (0o600, 0)


def test_whether_clients_reach_what_is_bound(folder: Path) -> None:
    address = f"unix://{folder}/s"
    with bind(address) as listener, bind("tcp://127.0.0.1:0") as tcp:
        assert is_reached(f"{address}?mode=0600", listener.fileno())
        assert not is_reached(f"unix://{folder}/t", listener.fileno())
        assert not is_reached(f"tcp://127.0.0.1:{tcp.getsockname()[1]}", tcp.fileno())
        (folder / "s").rename(folder / "t")
        assert not is_reached(address, listener.fileno())
        (folder / "t").rename(folder / "s")
        listener.shutdown(socket.SHUT_RDWR)
        assert not is_reached(address, listener.fileno())


def test_a_group_that_is_not_there(folder: Path) -> None:
    with pytest.raises(InvalidArgument, match="no group 'no-such-group'"):
        bind(f"unix://{folder}/s?group=no-such-group")


@pytest.mark.parametrize("gid", [2**32 - 1, 2**32, 10**31])
def test_a_group_that_cannot_be(folder: Path, gid: int) -> None:
    """The first of them would leave the group as it is."""
    with pytest.raises(InvalidArgument, match=f"no group '{gid}'"):
        bind(f"unix://{folder}/s?group={gid}")
    assert not (folder / "s").exists()
    assert os.listdir(folder) == []


@pytest.mark.skipif(sys.platform != "linux", reason="abstract names are Linux's")
def test_an_abstract_name() -> None:
    name = f"fdshare-binding-{os.getpid()}"
    with bind(f"unix:@{name}") as listener:
        assert listener.getsockname() == b"\0" + name.encode()
        with pytest.raises(AddressInUse) as caught:
            bind(f"unix:@{name}")
        assert caught.value.pid == os.getpid()


def test_a_stale_socket_is_replaced(stale: Path) -> None:
    with bind(f"unix://{stale}") as listener, socket.socket(socket.AF_UNIX) as client:
        client.connect(str(stale))
        assert listens(listener)


def test_ones_own_stale_socket_in_a_sticky_folder_is_replaced(stale: Path) -> None:
    stale.parent.chmod(0o1777)
    with bind(f"unix://{stale}") as listener:
        assert listens(listener)


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a socket away")
def test_anothers_stale_socket_in_a_sticky_folder_is_left_alone(stale: Path) -> None:
    stale.parent.chmod(0o1777)
    os.chown(stale, 12345, 12345)
    with pytest.raises(AddressInUse, match="others can write"):
        bind(f"unix://{stale}")
    assert stale.exists()


@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_a_stale_socket_where_others_can_write_is_left_alone(stale: Path, mode: int) -> None:
    stale.parent.chmod(mode)
    before = stale.stat()
    with pytest.raises(AddressInUse) as caught:
        bind(f"unix://{stale}")
    assert "others can write" in str(caught.value)
    assert caught.value.pid is None
    assert stale.stat() == before
    assert os.listdir(stale.parent) == ["s"]


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a folder away")
def test_a_stale_socket_in_anothers_folder_is_left_alone(stale: Path) -> None:
    os.chown(stale.parent, 12345, 12345)
    with pytest.raises(AddressInUse):
        bind(f"unix://{stale}")
    assert stale.exists()


def test_a_path_that_is_free_where_others_can_write(folder: Path) -> None:
    folder.chmod(0o1777)
    bind(f"unix://{folder}/s").close()


@pytest.mark.parametrize("mode", [0o700, 0o777])
def test_a_live_server_is_named(folder: Path, mode: int) -> None:
    folder.chmod(mode)
    with bind(f"unix://{folder}/s"):
        with pytest.raises(AddressInUse) as caught:
            bind(f"unix://{folder}/s")
        assert caught.value.pid == os.getpid()
        assert os.listdir(folder) == ["s"]


def test_a_live_server_whose_queue_is_full_is_left_alone(folder: Path) -> None:
    path = folder / "s"
    with bind(f"unix://{path}", backlog=0), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        before = path.stat()
        with pytest.raises(AddressInUse):
            bind(f"unix://{path}")
        assert path.stat() == before


@pytest.mark.parametrize("make", [Path.touch, Path.mkdir, os.mkfifo])
def test_what_is_no_socket_is_left_alone(folder: Path, make: object) -> None:
    make(folder / "s")  # type: ignore[operator]
    before = (folder / "s").stat()
    with pytest.raises(AddressInUse) as caught:
        bind(f"unix://{folder}/s")
    assert "not a socket" in str(caught.value)
    assert (folder / "s").stat() == before


def test_a_folder_that_is_missing(folder: Path) -> None:
    with pytest.raises(EndpointError) as caught:
        bind(f"unix://{folder}/missing/s")
    assert "mkdir" in str(caught.value)


def test_a_long_path(folder: Path) -> None:
    deep = folder / ("d" * 60) / ("e" * 60)
    deep.mkdir(parents=True)
    if sys.platform != "linux":
        with pytest.raises(EndpointError):
            bind(f"unix://{deep}/s")
        return
    with bind(f"unix://{deep}/s"):
        assert stat.S_ISSOCK((deep / "s").stat().st_mode)


# What no address can mend.


@pytest.mark.parametrize("backlog", [-1, 2**31])
def test_a_backlog_that_is_no_backlog(backlog: int) -> None:
    with pytest.raises(InvalidArgument):
        bind("tcp://127.0.0.1:0", backlog=backlog)


def test_a_path_has_no_port_to_share(folder: Path) -> None:
    with pytest.raises(InvalidArgument):
        bind(f"unix://{folder}/s", reuse_port=True)
    assert not os.listdir(folder)


def test_a_name_is_not_looked_up() -> None:
    with pytest.raises(InvalidArgument) as caught:
        bind("tcp://example.org:80")
    assert "localhost" in str(caught.value)


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:0", "udp://127.0.0.1:0", "unix://{}/s"])
def test_no_descriptor_left(folder: Path, address: str) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    first_free = os.dup(0)
    os.close(first_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (first_free, hard))
    try:
        with pytest.raises(DescriptorLimit) as caught:
            bind(address.format(folder))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert caught.value.whose == "server"
    assert caught.value.limit == first_free
