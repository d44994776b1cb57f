"""Endpoints with a name: who gets the path, what is refused and in which words, what is removed."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
from nursery import Process

from fdshare.errors import AddressInUse, EndpointError, NoServer, ServerTimeout
from fdshare.kernel import (
    Descriptor,
    Listener,
    cli_conn,
    connect,
    datagram,
    listen,
    recv_fds,
    s_pipe,
    send_fds,
    serv_accept,
    serv_listen,
)
from fdshare.kernel.unix_address import SUN_PATH, absolute

AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")


def python(code: str, *args: object) -> subprocess.Popen[str]:
    return Process(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


LISTEN = """
    import os, sys
    from fdshare.kernel import listen
    with listen(sys.argv[1]) as listener:
        print("ready", flush=True)
        sys.stdin.readline()
        os._exit(9)  # as if killed: nothing is cleaned up
"""


def live_server(path: Path) -> subprocess.Popen[str]:
    child = python(LISTEN, path)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    return child


def die(child: subprocess.Popen[str]) -> None:
    with child:
        child.communicate("\n", timeout=20)
        assert child.wait(20) == 9


def leave_stale(path: Path) -> os.stat_result:
    """A socket file that nobody has open."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
    return path.lstat()


def test_s_pipe_is_full_duplex_and_carries_descriptors() -> None:
    left, right = s_pipe()
    with left, right:
        for one, other in ((left, right), (right, left)):
            send_fds(one, [0], b"x")
            recv_fds(other, 1, 1).close()


def test_serv_listen_accept_cli_conn(folder: Path) -> None:
    with serv_listen(folder / "s") as listener, cli_conn(folder / "s") as client:
        conn, who = serv_accept(listener)
        with conn:
            assert (who.pid, who.uid, who.gid) == (os.getpid(), os.geteuid(), os.getegid())
            client.send(b"x")
            assert conn.recv(1) == b"x"
            assert not os.get_inheritable(conn.fileno())
    assert os.listdir(folder) == ["s.lock"]


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077, 0o777])
@pytest.mark.parametrize("mode", [0o600, 0o660, 0o666, 0o777, 0o000])
def test_the_mode_is_right_whatever_the_umask(folder: Path, mode: int, umask: int) -> None:
    before = os.umask(umask)
    try:
        with listen(folder / "s", mode=mode):
            assert stat.S_IMODE((folder / "s").stat().st_mode) == mode
            assert stat.S_IMODE((folder / "s.lock").stat().st_mode) == 0o600 & ~umask
    finally:
        assert os.umask(before) == umask


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the umask does it")
def test_the_mode_is_right_from_the_first_moment(folder: Path) -> None:
    """A watcher of the folder never sees the socket with another mode."""
    seen = set()
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            try:
                seen.add(stat.S_IMODE(os.lstat(folder / "s").st_mode))
            except FileNotFoundError:
                pass

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for _ in range(100):
            listen(folder / "s").close()
    finally:
        done.set()
        watcher.join()
    assert seen <= {0o600}


def test_a_live_server_is_named(folder: Path) -> None:
    child = live_server(folder / "s")
    with pytest.raises(AddressInUse) as caught:
        listen(folder / "s")
    assert caught.value.pid == child.pid
    assert caught.value.errno == errno.EADDRINUSE
    assert f"pid {child.pid}" in str(caught.value)
    connect(folder / "s", timeout=20).close()  # and it was left alone
    die(child)


def test_a_live_server_with_a_full_backlog_is_named(folder: Path) -> None:
    with listen(folder / "s", backlog=0), connect(folder / "s"):
        with pytest.raises(AddressInUse) as caught:
            listen(folder / "s")
        assert caught.value.pid == os.getpid()


def test_a_live_server_that_takes_no_lock(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.bind(f"{folder}/s")
        stranger.listen()
        with pytest.raises(AddressInUse) as caught:
            listen(folder / "s")
        assert caught.value.pid == os.getpid()
    listen(folder / "s").close()


@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_SEQPACKET])
def test_a_live_socket_of_another_type(folder: Path, kind: int) -> None:
    with socket.socket(socket.AF_UNIX, kind) as stranger:
        stranger.bind(f"{folder}/s")
        if kind != socket.SOCK_DGRAM:
            stranger.listen()
        with pytest.raises(AddressInUse):
            listen(folder / "s")
        with pytest.raises(EndpointError, match="another type"):
            connect(folder / "s")
        assert (folder / "s").is_socket()


def test_a_dead_ones_socket_is_taken(folder: Path) -> None:
    die(live_server(folder / "s"))
    before = (folder / "s").lstat()
    with listen(folder / "s"):
        assert (folder / "s").lstat().st_ctime_ns != before.st_ctime_ns
        connect(folder / "s").close()


def test_a_dead_ones_socket_stays_where_that_is_asked(folder: Path) -> None:
    before = leave_stale(folder / "s")
    with pytest.raises(AddressInUse, match="stale") as caught:
        listen(folder / "s", reclaim=False)
    assert caught.value.pid is None
    assert (folder / "s").lstat() == before


def _make(kind: str, path: Path) -> None:
    if kind == "file":
        path.write_text("precious")
    elif kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to("somewhere")


@pytest.mark.parametrize("kind", ["file", "folder", "fifo", "link"])
def test_what_is_no_socket_is_never_removed(folder: Path, kind: str) -> None:
    _make(kind, folder / "s")
    before = (folder / "s").lstat()
    for make in (listen, datagram):
        with pytest.raises(AddressInUse, match="not a socket"):
            make(folder / "s")
    with pytest.raises(EndpointError):
        connect(folder / "s")
    assert (folder / "s").lstat().st_ino == before.st_ino
    assert os.listdir(folder) == ["s"]


TAKE = """
    import sys
    from fdshare.kernel import listen
    from fdshare.errors import AddressInUse
    print("up", flush=True)
    sys.stdin.readline()
    try:
        listener = listen(sys.argv[1])
    except AddressInUse as error:
        print("refused", error.pid, flush=True)
    else:
        print("won", flush=True)
        sys.stdin.readline()
        listener.close()
"""


def test_many_starters_on_a_stale_path_one_wins(folder: Path) -> None:
    for _ in range(3):
        leave_stale(folder / "s")
        children = [python(TAKE, folder / "s") for _ in range(6)]
        for child in children:
            assert child.stdout is not None
            assert child.stdout.readline() == "up\n"
        for child in children:
            assert child.stdin is not None
            child.stdin.write("go\n")
            child.stdin.flush()
        said = {}
        for child in children:
            assert child.stdout is not None
            said[child.pid] = child.stdout.readline().split()
        winners = [pid for pid, words in said.items() if words == ["won"]]
        assert len(winners) == 1
        assert all(w == ["refused", str(winners[0])] for w in said.values() if w != ["won"])
        connect(folder / "s").close()
        for child in children:
            child.communicate("\n", timeout=20)
            assert child.returncode == 0
        assert os.listdir(folder) == ["s.lock"]


def test_the_lock_is_kept_and_held(folder: Path) -> None:
    with listen(folder / "s") as listener:
        inode = (folder / "s.lock").stat().st_ino
        assert not os.get_inheritable(listener.lock_fileno() or -1)
        with (
            Descriptor(os.open(folder / "s.lock", os.O_RDWR)) as other,
            pytest.raises(BlockingIOError),
        ):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert (folder / "s.lock").stat().st_ino == inode
    with listen(folder / "s"):
        assert (folder / "s.lock").stat().st_ino == inode


@pytest.mark.parametrize("kind", ["folder", "fifo", "link"])
def test_a_lock_that_is_none(folder: Path, kind: str) -> None:
    _make(kind, folder / "s.lock")
    with pytest.raises(EndpointError, match="cannot lock"):
        listen(folder / "s")
    assert os.listdir(folder) == ["s.lock"]


@AS_ROOT
def test_a_lock_of_somebody_else(folder: Path) -> None:
    (folder / "s.lock").touch()
    os.chown(folder / "s.lock", 65534, 65534)
    with pytest.raises(EndpointError, match="belongs to uid 65534"):
        listen(folder / "s")


def test_close_removes_our_inode_only(folder: Path) -> None:
    listener = listen(folder / "s")
    os.unlink(folder / "s")
    leave_stale(folder / "s")
    listener.close()
    assert (folder / "s").is_socket()
    listener.close()
    second = listen(folder / "s")
    os.unlink(folder / "s")
    (folder / "s").write_text("precious")
    second.close()
    assert (folder / "s").read_text() == "precious"


def test_close_after_chdir_removes_a_relative_path(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    listener = listen("s")
    assert listener.address == str(folder / "s")
    monkeypatch.chdir("/")
    listener.close()
    assert os.listdir(folder) == ["s.lock"]


def test_a_forked_child_leaves_the_path_alone(folder: Path) -> None:
    code = """
        import os, sys
        from fdshare.kernel import connect, listen
        with listen(sys.argv[1]) as listener:
            pid = os.fork()
            if pid == 0:
                listener.close()
                os._exit(0)
            os.waitpid(pid, 0)
            connect(sys.argv[1]).close()
            print("still there")
    """
    assert python(code, folder / "s").communicate(timeout=20)[0] == "still there\n"


def test_a_listener_is_handed_to_another_process(folder: Path) -> None:
    """Socket, lock, address and inode are all there is to it."""
    code = """
        import socket, sys
        from fdshare.kernel import Descriptor, Listener
        address, fd, lock, dev, ino = sys.argv[1:]
        sock = socket.socket(fileno=int(fd))
        with Listener(address, sock, Descriptor(int(lock)), (int(dev), int(ino))) as listener:
            print("ready", flush=True)
            conn, who = listener.accept()
            with conn:
                conn.send(b"%d\\n" % who.pid)
                conn.recv(1)
    """
    listener = listen(folder / "s")
    assert listener.inode is not None
    address, inode = listener.address, listener.inode
    sock, lock = listener.detach()
    listener.close()
    assert lock is not None
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), address]
        + [str(number) for number in (sock.fileno(), lock.fileno(), *inode)],
        pass_fds=[sock.fileno(), lock.fileno()],
        stdout=subprocess.PIPE,
        text=True,
    )
    sock.close()
    lock.close()
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        with connect(folder / "s") as conn, conn.makefile() as answer:
            assert int(answer.readline()) == os.getpid()
            with pytest.raises(AddressInUse):
                listen(folder / "s")
        assert child.wait(20) == 0
    assert os.listdir(folder) == ["s.lock"]


def test_adopt_takes_a_listening_socket_and_nothing_else(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(f"{folder}/s")
        with pytest.raises(EndpointError, match="does not listen"):
            Listener.adopt(sock)
        sock.listen()
        with Listener.adopt(sock) as listener:
            assert listener.address == f"{folder}/s"
            assert listener.lock_fileno() is None
            connect(folder / "s").close()
    assert (folder / "s").is_socket()
    with socket.socket() as sock, pytest.raises(EndpointError, match="no UNIX socket"):
        Listener.adopt(sock)


def test_paths_longer_than_sun_path(folder: Path) -> None:
    deep = folder / ("x" * 60) / ("y" * 60)
    deep.mkdir(parents=True)
    path = deep / "s"
    assert len(bytes(path)) >= SUN_PATH
    with listen(path, mode=0o640) as listener:
        assert listener.address == str(path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        connect(path).close()
        with pytest.raises(AddressInUse) as caught:
            listen(path)
        assert caught.value.pid == os.getpid()
    assert os.listdir(deep) == ["s.lock"]
    with datagram(path), datagram(deep / "other") as other:
        with connect(path, kind=socket.SOCK_DGRAM) as conn:
            conn.send(b"x")
        assert other.address == str(deep / "other")
    leave = deep / "z"
    with pytest.raises(NoServer):
        connect(leave)


@pytest.mark.parametrize("length", range(SUN_PATH - 3, SUN_PATH + 4))
def test_paths_around_the_limit(folder: Path, length: int) -> None:
    path = folder / ("d" * 40)
    path.mkdir()
    path = path / ("n" * (length - len(bytes(path)) - 1))
    assert len(bytes(path)) == length
    with listen(path), connect(path):
        pass


def test_a_last_part_that_no_trick_can_bind(folder: Path) -> None:
    path = folder / ("n" * 150)
    with pytest.raises(EndpointError, match="150 bytes") as caught:
        listen(path)
    assert caught.value.errno == errno.ENAMETOOLONG
    # It can be reached all the same.
    with listen(folder / "s"):
        os.rename(folder / "s", path)
        connect(path).close()
        os.unlink(path)


def test_abstract_names(folder: Path) -> None:
    name = f"@fdshare-test-{os.getpid()}"
    with listen(name) as listener:
        assert listener.address == name
        assert listener.lock_fileno() is None
        with connect(name):
            conn, who = listener.accept()
            conn.close()
        assert who.pid == os.getpid()
        with pytest.raises(AddressInUse) as caught:
            listen(name)
        assert caught.value.pid == os.getpid()
        with Listener.adopt(socket.socket(fileno=os.dup(listener.fileno()))) as adopted:
            assert adopted.address == name
    with pytest.raises(NoServer, match="abstract"):
        connect(name)
    longest = "@" + "n" * (SUN_PATH - 1)
    with listen(longest), connect(longest):
        pass
    with pytest.raises(EndpointError, match="107 bytes"):
        listen(longest + "n")


@pytest.mark.parametrize("address", ["", "@", b"", "a\0b", "@a\0b"])
@pytest.mark.parametrize("call", [listen, connect, datagram])
def test_addresses_that_are_none(address: str, call: type) -> None:
    with pytest.raises(EndpointError) as caught:
        call(address)
    assert caught.value.errno == errno.EINVAL


def test_a_path_that_is_not_utf8(folder: Path) -> None:
    path = bytes(folder) + b"/\xff\xfe"
    with listen(path) as listener, connect(path):
        assert os.fsencode(listener.address) == path
    assert absolute(b"/tmp/x") == absolute(Path("/tmp/x")) == "/tmp/x"


def test_a_folder_that_is_missing_or_none(folder: Path) -> None:
    with pytest.raises(EndpointError, match=f"mkdir -p {folder}/no") as caught:
        listen(folder / "no" / "s")
    assert caught.value.errno == errno.ENOENT
    (folder / "file").touch()
    with pytest.raises(EndpointError, match="is not a directory") as caught:
        listen(folder / "file" / "s")
    assert caught.value.errno == errno.ENOTDIR
    with pytest.raises(EndpointError, match="too long"):
        listen(folder / ("x" * 300) / "s")
    for missing in (folder / "no" / "s", folder / "file" / "s"):
        with pytest.raises(NoServer):
            connect(missing)


@AS_ROOT
def test_a_folder_where_we_may_not_write_and_a_socket_we_may_not_open(folder: Path) -> None:
    code = """
        import os, sys
        from fdshare.kernel import connect, listen
        from fdshare.errors import EndpointError
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
        for call, name in ((listen, "new"), (connect, "s")):
            try:
                call(sys.argv[1] + "/" + name)
            except EndpointError as error:
                print(error.errno, error)
    """
    folder.chmod(0o755)
    with listen(folder / "s"):
        out = python(code, folder).communicate(timeout=20)[0]
    refused, unreachable = out.splitlines()
    assert refused.startswith(f"{errno.EACCES} {folder}/new: uid 65534 may not write to {folder}")
    assert "owner uid 0, mode 0755" in refused
    assert unreachable.startswith(f"{errno.EACCES} {folder}/s: uid 65534 may not connect")
    assert "mode 0600" in unreachable


def test_nobody_there(folder: Path) -> None:
    with pytest.raises(NoServer, match="no such file") as caught:
        connect(folder / "s")
    assert isinstance(caught.value, FileNotFoundError)
    leave_stale(folder / "s")
    with pytest.raises(NoServer, match="gone") as caught:
        connect(folder / "s")
    assert caught.value.errno == errno.ECONNREFUSED


def test_a_full_backlog_is_waited_for(folder: Path) -> None:
    with listen(folder / "s", backlog=0) as listener, connect(folder / "s", timeout=0):
        with pytest.raises(ServerTimeout):
            connect(folder / "s", timeout=0)
        with pytest.raises(ServerTimeout, match=r"0\.05"):
            connect(folder / "s", timeout=0.05)
        made = []
        waiting = threading.Thread(target=lambda: made.append(connect(folder / "s", timeout=20)))
        waiting.start()
        for _ in range(2):
            listener.accept()[0].close()
        waiting.join(20)
        assert made[0].gettimeout() is None
        made[0].close()


def test_datagram_endpoints_can_be_answered(folder: Path) -> None:
    with (
        listen(folder / "server", kind=socket.SOCK_DGRAM) as server,
        datagram(folder / "client") as client,
        datagram() as unnamed,
    ):
        for endpoint in (client, unnamed):
            send_fds(endpoint.socket, [0], b"question", address=server.address)
            with recv_fds(server.socket, 100, 1) as got:
                assert got.address is not None
                send_fds(server.socket, [], b"answer", address=got.address)
            assert recv_fds(endpoint.socket, 100, 0).data == b"answer"
        with pytest.raises(AddressInUse):
            datagram(folder / "client")
        with pytest.raises(AddressInUse):
            listen(folder / "server", kind=socket.SOCK_DGRAM)
    assert os.listdir(folder) == ["server.lock"]


def test_a_stale_name_of_a_datagram_client_is_not_taken(folder: Path) -> None:
    leave_stale(folder / "client")
    with pytest.raises(AddressInUse, match="stale"):
        datagram(folder / "client")


def test_repr(folder: Path) -> None:
    listener = listen(folder / "s")
    assert repr(listener) == f"<Listener {folder}/s>"
    listener.close()
    assert repr(listener) == f"<Listener {folder}/s closed>"
