"""Where a private server listens, whatever others have done to its names."""

from __future__ import annotations

import fcntl
import os
import socket
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import line
from users import AsUser, Say, needs_root

from fdshare.errors import NoServer, ServerTimeout, UntrustedServer
from fdshare.kernel.endpoint import Listener
from fdshare.parking.private_address import (
    connect_private,
    leave,
    listen_private,
    new_address,
    remove_dead,
)

STRANGER = 1501


@pytest.fixture
def address(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A new address, in a folder for temporary files of the test's own."""
    folder.chmod(0o1777)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return new_address()


def abstract(address: str) -> str:
    return "\0" + Path(address).parent.name


@contextmanager
def listening(address: str) -> Iterator[list[Listener]]:
    listeners = listen_private(address)
    inode = listeners[0].inode if listeners else None
    yield listeners
    leave(address, inode)
    close(listeners)


def close(listeners: list[Listener]) -> None:
    """As in the process of the starter, and at a death: the path stays."""
    for listener in listeners:
        listener.leave_path()
        listener.close()


def reaches(address: str, listener: Listener) -> bool:
    """Whether a connection to *address* arrives at *listener*."""
    with connect_private(address, 5):
        listener.socket.setblocking(False)
        try:
            listener.socket.accept()[0].close()
        except BlockingIOError:
            return False
        return True


def test_a_path_and_an_abstract_name(address: str, folder: Path) -> None:
    assert not list(folder.iterdir())
    with listening(address) as (path, name):
        assert (path.address, name.address[1:]) == (address, abstract(address)[1:])
        assert stat.S_IMODE(Path(address).parent.stat().st_mode) == 0o700
        assert reaches(address, path)
        os.rename(folder, f"{folder}-away")
        assert reaches(address, name)
        os.rename(f"{folder}-away", folder)
    assert not list(folder.iterdir())
    with pytest.raises(NoServer):
        connect_private(address, 5)


def test_a_path_that_is_longer_than_an_address(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = folder / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    address = new_address()
    with listening(address) as (path, _):
        assert reaches(address, path)
    assert not list(deep.iterdir())


def test_no_folder_for_temporary_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise FileNotFoundError

    with monkeypatch.context() as patched:
        patched.setattr(tempfile, "gettempdir", none)
        address = new_address()
    assert address.startswith("@")
    with listening(address) as (name,):
        assert reaches(address, name)
        assert listen_private(address) == []
    monkeypatch.setattr(tempfile, "tempdir", str(folder / "missing"))
    address = new_address()
    with listening(address) as (name,):
        assert reaches(address, name)


def test_one_of_two_starters_is_let_through(address: str) -> None:
    with listening(address):
        assert listen_private(address) == []


def test_a_dead_one_is_replaced(address: str) -> None:
    close(listen_private(address))
    assert Path(address).exists()
    with listening(address) as (path, _):
        assert reaches(address, path)


def test_who_ends_leaves_a_successor_alone(address: str) -> None:
    first = listen_private(address)
    inode = first[0].inode
    Path(address).unlink()
    with listening(address) as (path,):
        leave(address, inode)
        assert reaches(address, path)
    close(first)


# Another user knows the names.


def squat(address: str, *, folder: bool, name: bool, backlog: int = 10) -> AsUser:
    """A stranger who has taken the folder, and listens on the abstract name."""

    def task(say: Say) -> Any:
        made = []
        if folder:
            os.mkdir(os.path.dirname(address), 0o755)
            made.append(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            made[-1].bind(address)
            os.chmod(address, 0o777)
            made[-1].listen()
        if name:
            made.append(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            made[-1].bind(abstract(address))
            made[-1].listen(backlog)
            if not backlog:  # which has room for one
                made.append(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
                made[-1].connect(abstract(address))
        say("squats")
        return made

    stranger = AsUser(STRANGER, task)
    assert stranger.hear() == "squats"
    return stranger


@needs_root
def test_the_abstract_name_is_taken(address: str) -> None:
    with squat(address, folder=False, name=True):
        with pytest.raises(UntrustedServer):
            connect_private(address, 5)
        with listening(address) as (path,):
            assert reaches(address, path)


@needs_root
def test_the_folder_is_taken(address: str) -> None:
    with squat(address, folder=True, name=False):
        with pytest.raises(UntrustedServer):
            connect_private(address, 5)
        with listening(address) as (name,):
            assert reaches(address, name)


@needs_root
def test_both_are_taken(address: str) -> None:
    with squat(address, folder=True, name=True):
        assert listen_private(address) == []
        with pytest.raises(UntrustedServer):
            connect_private(address, 5)


@needs_root
def test_nobody_is_waited_for_at_the_abstract_name(address: str) -> None:
    with squat(address, folder=False, name=True, backlog=0):
        with pytest.raises(ServerTimeout):
            connect_private(address, 60)
        with listening(address) as (path,):
            assert reaches(address, path)


def test_a_folder_that_others_may_use_is_not_ours(address: str) -> None:
    Path(address).parent.mkdir()
    Path(address).parent.chmod(0o750)
    with listening(address) as (name,):
        assert name.address.startswith("@")
    assert Path(address).parent.exists()


def test_a_link_is_not_followed(address: str, folder: Path) -> None:
    (folder / "elsewhere").mkdir(mode=0o700)
    Path(address).parent.symlink_to(folder / "elsewhere")
    with listening(address) as (name,):
        assert name.address.startswith("@")
    assert not list((folder / "elsewhere").iterdir())


def test_the_uid_that_everybody_has_is_not_ours(child: Callable[..., Any]) -> None:
    """In a user namespace without a mapping all users are shown as one."""
    process = child("""
        import ctypes, socket
        from fdshare.kernel.credentials import peer_credentials
        from fdshare.parking.private_address import is_ours
        near, far = socket.socketpair()
        print(is_ours(peer_credentials(near)), flush=True)
        if ctypes.CDLL(None).unshare(0x10000000):  # CLONE_NEWUSER
            print("not allowed")
        else:
            print(is_ours(peer_credentials(near)))
    """)
    assert line(process) == "True"
    if (said := line(process)) == "not allowed":
        pytest.skip("unshare(2) is not allowed here")
    assert said == "False"


# What a server that was killed has left.


def test_the_dead_are_removed(address: str, folder: Path) -> None:
    close(listen_private(address))
    Path(new_address()).parent.mkdir(mode=0o700)  # killed before it had bound anything
    alive, starting = new_address(), new_address()
    others = folder / "fdshare-private-of-a-program"
    others.mkdir()
    (others / "file").touch()
    Path(starting).parent.mkdir(mode=0o700)
    fd = os.open(Path(starting).parent, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    with listening(alive) as (path, _):
        remove_dead(alive)
        assert {*folder.iterdir()} == {Path(alive).parent, Path(starting).parent, others}
        assert reaches(alive, path)
        os.close(fd)
        remove_dead(alive)
        assert {*folder.iterdir()} == {Path(alive).parent, others}
    remove_dead("@abstract")
    remove_dead(str(folder / "missing" / "folder" / "sock"))


@needs_root
def test_what_is_another_users_stays(address: str, folder: Path) -> None:
    theirs = Path(new_address()).parent
    theirs.mkdir(mode=0o700)
    os.chown(theirs, STRANGER, STRANGER)
    remove_dead(address)
    assert theirs.exists()
