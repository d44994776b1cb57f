"""The file of a socket: its mode and owner from the first moment on, and that it is no other."""

from __future__ import annotations

import os
import socket
import stat
import sys
import threading
from pathlib import Path

import pytest
from users import as_user

from fdshare.errors import EndpointError
from fdshare.kernel import bound_path, listen
from kernel.sockets import python

AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give a file away")


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


@pytest.mark.parametrize("mode", [0o600, 0o660, 0o777, 0o000])
def test_the_mode_is_right_where_the_umask_does_it(folder: Path, mode: int) -> None:
    """Elsewhere than on Linux; the umask of the process is as before."""
    before = os.umask(0o022)
    os.umask(before)
    with socket.socket(socket.AF_UNIX) as sock:
        info = bound_path._bind_umask("s", sock, bytes(folder / "s"), mode, None)
        assert stat.S_IMODE(info.st_mode) == mode
        assert info.st_ino == (folder / "s").lstat().st_ino
    assert os.umask(before) == before


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


@AS_ROOT
@pytest.mark.parametrize("mode", [0o600, 0o666])
def test_the_owner_is_right(folder: Path, mode: int) -> None:
    with listen(folder / "s", mode=mode, owner=(61234, -1)):
        info = os.stat(folder / "s")
        assert (info.st_uid, info.st_gid, info.st_mode & 0o7777) == (61234, os.getegid(), mode)


@AS_ROOT
@pytest.mark.parametrize("moment", ["open", "os.chown", "os.chmod"])
def test_a_path_that_is_swapped_takes_no_other_file_along(folder: Path, moment: str) -> None:
    """Who may write the folder puts a link in the place of the socket: before, the file behind the
    link got the owner or the mode."""
    code = """
        import os, socket, sys
        from fdshare.errors import EndpointError
        from fdshare.kernel import listen
        path, target, moment = sys.argv[1:]
        def swap(event, arguments):
            if event == moment and os.path.exists(path) and not os.path.islink(path):
                os.unlink(path)
                os.symlink(target, path)
        sys.addaudithook(swap)
        try:
            listen(path, mode=0o666, owner=(61234, 61234)).close()
            print("bound")
        except EndpointError as error:
            print(error)
    """
    target = folder / "target"
    target.touch(0o600)
    out = python(code, folder / "s", target, moment).communicate(timeout=20)[0]
    info = target.stat()
    assert (info.st_uid, info.st_mode & 0o7777) == (os.geteuid(), 0o600)
    assert (folder / "s").is_symlink()
    assert ("replaced" in out) is (moment == "open")


@AS_ROOT
def test_a_socket_that_cannot_be_given_away_leaves_no_file(folder: Path) -> None:
    """The next to bind would take it for that of a server that died."""
    folder.chmod(0o777)
    said = as_user(61234, lambda: listen(folder / "s", owner=(-1, 0)))
    assert said.startswith("EndpointError: ")
    assert "uid 61234 may not give the socket that owner" in said
    assert not (folder / "s").exists()


def test_a_full_descriptor_table_leaves_no_file(folder: Path) -> None:
    """The socket has the last descriptor, and its file cannot be looked at."""
    code = """
        import os, resource, socket, sys
        from fdshare.errors import EndpointError
        from fdshare.kernel.bound_path import bind_path
        sock = socket.socket(socket.AF_UNIX)
        resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
        try:
            while True:
                os.dup(0)
        except OSError:
            pass
        try:
            bind_path(sys.argv[1], sock, 0o600, None)
        except EndpointError as error:
            print(error)
    """
    out = python(code, folder / "s").communicate(timeout=20)[0]
    assert "Too many open files" in out
    assert not (folder / "s").exists()


def test_the_file_of_a_socket_is_set_and_no_other(folder: Path) -> None:
    with listen(folder / "s"):
        bound_path.set_file(str(folder / "s"), 0o660, (-1, os.getegid()))
        assert stat.S_IMODE((folder / "s").stat().st_mode) == 0o660
    (folder / "target").touch(0o600)
    (folder / "link").symlink_to(folder / "target")
    for name in ("link", "target", "absent"):
        with pytest.raises(EndpointError):
            bound_path.set_file(str(folder / name), 0o666, None)
    assert stat.S_IMODE((folder / "target").stat().st_mode) == 0o600
