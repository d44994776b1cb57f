"""path_lock: who gets a path, what is refused and in which words, what is never removed."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from pathlib import Path

import pytest
from server.full import limited

from fdshare.errors import AddressInUse, EndpointError
from fdshare.kernel import (
    Descriptor,
    connect,
    datagram,
    listen,
)
from fdshare.kernel.path_lock import live, lock, remove
from kernel.sockets import die, leave_stale, live_server, make_other, python

AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")


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


@pytest.mark.parametrize("kind", ["file", "folder", "fifo", "link"])
def test_what_is_no_socket_is_never_removed(folder: Path, kind: str) -> None:
    make_other(kind, folder / "s")
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


def test_a_copy_does_not_keep_the_lock_of_a_listener_that_is_closed(folder: Path) -> None:
    """A process that hangs in its end has one, and closes nothing any more."""
    listener = listen(folder / "s")
    with Descriptor(os.dup(listener.lock_fileno() or -1)):
        listener.close()
        listen(folder / "s").close()


def test_a_listener_that_leaves_its_path_leaves_the_lock_to_its_copies(folder: Path) -> None:
    listener = listen(folder / "s")
    with Descriptor(os.dup(listener.lock_fileno() or -1)):
        listener.leave_path()
        listener.close()
        with pytest.raises(AddressInUse):
            listen(folder / "s")


@pytest.mark.parametrize("kind", ["folder", "fifo", "link"])
def test_a_lock_that_is_none(folder: Path, kind: str) -> None:
    make_other(kind, folder / "s.lock")
    with pytest.raises(EndpointError, match="cannot lock"):
        listen(folder / "s")
    assert os.listdir(folder) == ["s.lock"]


def test_a_lock_for_which_no_descriptor_is_free_is_none_to_remove(folder: Path) -> None:
    (folder / "s.lock").touch()
    with limited(os.getpid(), 0), pytest.raises(EndpointError) as caught:
        lock(f"{folder}/s")
    assert caught.value.reason == "Too many open files"


def test_a_live_server_is_refused_without_a_descriptor_to_ask_for_its_pid(folder: Path) -> None:
    with listen(folder / "s"), limited(os.getpid(), 0):
        assert live(f"{folder}/s", socket.SOCK_STREAM).pid is None


@AS_ROOT
def test_a_lock_of_somebody_else(folder: Path) -> None:
    (folder / "s.lock").touch()
    os.chown(folder / "s.lock", 65534, 65534)
    with pytest.raises(EndpointError, match="belongs to uid 65534"):
        listen(folder / "s")


def test_remove_takes_the_very_inode(folder: Path) -> None:
    path = folder / "s"
    info = leave_stale(path)
    remove(str(path), (info.st_dev, info.st_ino + 1))
    assert path.is_socket()
    remove(str(path), (info.st_dev, info.st_ino))
    assert not path.exists()
    remove(str(path), (info.st_dev, info.st_ino))  # somebody else was faster
    remove(str(path / "below a file"), (0, 0))


def test_the_lock_lasts_as_long_as_any_copy(folder: Path) -> None:
    address = str(folder / "s")
    first = lock(address)
    with Descriptor(os.dup(first.fileno())):
        first.close()
        with pytest.raises(AddressInUse) as caught:
            lock(address)
        assert caught.value.pid == os.getpid()
    lock(address).close()


@AS_ROOT
def test_a_dead_socket_of_another_user(folder: Path) -> None:
    """In a folder with the sticky bit. Before, it was "a live server", with our own pid."""
    folder.chmod(0o1777)
    leave_stale(folder / "s")
    code = """
        import os, sys
        from fdshare.errors import AddressInUse
        from fdshare.kernel import listen
        os.setgroups([])
        os.setresuid(65534, 65534, 65534)
        try:
            listen(sys.argv[1])
        except AddressInUse as error:
            print(error.pid, error)
    """
    out = python(code, folder / "s").communicate(timeout=20)[0]
    assert out.startswith("None ")
    assert "a socket of uid 0" in out
    (folder / "s.lock").unlink()


def test_a_live_server_without_a_lock_and_with_a_full_backlog(folder: Path) -> None:
    """Nobody waits until it has room."""
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.bind(f"{folder}/s")
        stranger.listen(0)
        with connect(folder / "s"), pytest.raises(AddressInUse):
            listen(folder / "s")
        assert (folder / "s").is_socket()
