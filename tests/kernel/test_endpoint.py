"""Endpoints with a name: who gets the path, what is refused and in which words, what is removed."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest
from conftest import census

from fdshare.errors import AddressInUse, EndpointError, NoServer, ServerTimeout
from fdshare.kernel import (
    Listener,
    cli_conn,
    connect,
    datagram,
    endpoint,
    listen,
    recv_fds,
    s_pipe,
    send_fds,
    serv_accept,
    serv_listen,
)
from kernel.sockets import leave_stale, python


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
    with socket.socket() as sock, pytest.raises(EndpointError, match="not a UNIX socket"):
        Listener.adopt(sock)


def test_nobody_there(folder: Path) -> None:
    with pytest.raises(NoServer, match="no such file") as caught:
        connect(folder / "s")
    assert isinstance(caught.value, FileNotFoundError)
    assert "fdshare serve" not in str(caught.value)  # any program may be meant
    leave_stale(folder / "s")
    with pytest.raises(NoServer, match="gone") as caught:
        connect(folder / "s")
    assert caught.value.errno == errno.ECONNREFUSED


@pytest.mark.parametrize("through_link", [False, True])
def test_a_socket_that_is_removed_when_it_has_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, through_link: bool
) -> None:
    """By a server that binds the path anew: clients try again after NoServer alone."""
    leave_stale(folder / "s")
    (folder / "link").symlink_to("s")
    connect_within = endpoint._connect_within

    def connect_and_remove(*args: Any) -> None:
        try:
            connect_within(*args)
        finally:
            os.unlink(folder / "s")

    monkeypatch.setattr(endpoint, "_connect_within", connect_and_remove)
    with pytest.raises(NoServer, match="gone"):
        connect(folder / ("link" if through_link else "s"))


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


def test_a_path_that_is_gone_is_bound_anew(folder: Path) -> None:
    path = folder / "s"
    with listen(path, mode=0o600) as listener:
        assert not listener.bind_anew(mode=0o600, backlog=5)
        path.unlink()
        (folder / "s.lock").unlink()
        assert listener.bind_anew(mode=0o640, backlog=5)
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        with cli_conn(path) as near:
            listener.accept()[0].close()
            near.recv(1)
        with pytest.raises(AddressInUse):  # the new lock excludes, as the old one did
            listen(path)
    assert not path.exists()


def test_the_socket_of_a_dead_process_on_our_path_is_replaced(folder: Path) -> None:
    """Our predecessor may have died after it had bound the path anew."""
    path = folder / "s"
    with listen(path) as listener:
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            path.unlink()
            with socket.socket(socket.AF_UNIX, kind) as other:
                other.bind(str(path))
                if kind == socket.SOCK_STREAM:
                    other.listen()
                assert not listener.bind_anew(mode=0o600, backlog=5, reclaim=True)  # it lives
            assert not listener.bind_anew(mode=0o600, backlog=5)
            assert listener.bind_anew(mode=0o600, backlog=5, reclaim=True)
            with cli_conn(path) as near:
                listener.accept()[0].close()
                near.recv(1)
        assert not listener.bind_anew(mode=0o600, backlog=5, reclaim=True)  # it is ours
        path.unlink()
        path.touch()
        assert not listener.bind_anew(mode=0o600, backlog=5, reclaim=True)


def test_a_path_that_cannot_be_bound_anew(folder: Path) -> None:
    inner = folder / "inner"
    inner.mkdir()
    with listen(inner / "s") as listener:
        shutil.rmtree(inner)
        with pytest.raises(EndpointError, match="does not exist"):
            listener.bind_anew(mode=0o600, backlog=5)
        inner.mkdir()
        assert listener.bind_anew(mode=0o600, backlog=5)
    adopted = socket.socket(socket.AF_UNIX)
    adopted.bind(str(inner / "a"))
    adopted.listen()
    (inner / "a").unlink()
    with Listener.adopt(adopted) as listener:
        assert not listener.bind_anew(mode=0o600, backlog=5)


def test_repr(folder: Path) -> None:
    listener = listen(folder / "s")
    assert repr(listener) == f"<Listener {folder}/s>"
    listener.close()
    assert repr(listener) == f"<Listener {folder}/s closed>"


def test_a_connect_that_is_interrupted_leaves_nothing(folder: Path) -> None:
    """By Ctrl-C, while it waits for a full backlog."""

    def interrupt(number: int, frame: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, lambda *_: None)  # another may have come by now
        raise KeyboardInterrupt

    former = signal.signal(signal.SIGALRM, interrupt)
    try:
        with listen(folder / "s", backlog=0), connect(folder / "s", timeout=0):
            before = census()
            # Again and again: one signal may come just before connect(2) waits.
            signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
            with pytest.raises(KeyboardInterrupt):
                connect(folder / "s")
            assert census() == before
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
