"""unix_address: long paths, abstract names, and what an error of the path means."""

from __future__ import annotations

import errno
import os
import socket
import stat
from pathlib import Path

import pytest

from fdshare.errors import AddressInUse, EndpointError, NoServer
from fdshare.kernel import (
    Listener,
    connect,
    datagram,
    listen,
)
from fdshare.kernel.unix_address import SUN_PATH, absolute, file_type, is_abstract, sockaddr
from kernel.sockets import make_other, python

AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")


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


def test_words_for_what_a_file_is(folder: Path) -> None:
    words = {"file": "a regular file", "folder": "a directory", "fifo": "a FIFO"}
    for kind, word in words.items():
        make_other(kind, folder / kind)
        assert file_type((folder / kind).stat().st_mode) == word
    assert file_type(os.stat(os.devnull).st_mode) == "a device"
    assert file_type(0) == "something else"


def test_a_path_through_a_descriptor_closes_it(folder: Path) -> None:
    """Whether the socket is there to be connected to, or will be bound."""
    deep = folder / ("x" * 60) / ("y" * 60)
    deep.mkdir(parents=True)
    for exists in (True, False):
        with sockaddr(str(deep / "s"), exists=exists) as name:
            fd = int(name.split(b"/")[4])
            assert os.path.samestat(os.fstat(fd), deep.stat())
            assert len(name) < SUN_PATH
        with pytest.raises(OSError):
            os.fstat(fd)


def test_a_relative_path_means_the_folder_of_now(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    assert absolute("s") == str(folder / "s")
    assert absolute("./@s") == str(folder / "@s")
    assert absolute("@s") == "@s"
    assert (is_abstract("@s"), is_abstract("./@s")) == (True, False)
