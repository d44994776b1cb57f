"""Who is at the other end: asked of this kernel, and read from the structures of the others.

The bytes for FreeBSD and macOS are laid out as their headers say, in the byte order and with the
pointers of this machine; a C compiler, where there is one, confirms the offsets.
"""

from __future__ import annotations

import os
import shutil
import socket
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from fdshare.errors import ProtocolError, UnsupportedPlatform
from fdshare.kernel import (
    Credentials,
    enable_credentials,
    own_credentials,
    peer_credentials,
    peer_pidfd,
)
from fdshare.kernel import credentials as module
from fdshare.kernel.credentials import (
    PLATFORMS,
    Parser,
    parse_cmsgcred,
    parse_sockcred2,
    parse_ucred,
    parse_xucred,
    platform,
)

POINTER = struct.calcsize("P")
UCRED = struct.pack("=iII", 4242, 1001, 1002)
# version, uid, 3 groups and 2 bytes of padding, the effective one first; 13 unused
XUCRED_MACOS = struct.pack("=IIh2x16I", 0, 1001, 3, 1002, 20, 0, *[0] * 13)
# and the pid in a union with a pointer, aligned as that
XUCRED_FREEBSD = XUCRED_MACOS + bytes(-76 % POINTER) + struct.pack("=i", 4242) + bytes(POINTER - 4)
# pid, uid, euid, gid, 2 groups and padding, 14 unused
CMSGCRED = struct.pack("=iIIIh2x16I", 4242, 1001, 1003, 1002, 2, 1002, 20, *[0] * 14)
# version, pid, uid, euid, gid, egid, 2 groups
SOCKCRED2 = struct.pack("=iiIIIIi2I", 0, 4242, 1001, 1003, 1002, 1004, 2, 1004, 20)


@pytest.mark.parametrize(
    ("parse", "data", "expected"),
    [
        (parse_ucred, UCRED, Credentials(4242, 1001, 1002)),
        (parse_xucred, XUCRED_FREEBSD, Credentials(4242, 1001, 1002, (20, 0))),
        (parse_xucred, XUCRED_MACOS, Credentials(0, 1001, 1002, (20, 0))),
        (parse_cmsgcred, CMSGCRED, Credentials(4242, 1003, 1002, (20,))),
        (parse_sockcred2, SOCKCRED2, Credentials(4242, 1003, 1004, (20,))),
    ],
    ids=["ucred", "xucred-freebsd", "xucred-macos", "cmsgcred", "sockcred2"],
)
def test_structures_of_every_platform(parse: Parser, data: bytes, expected: Credentials) -> None:
    assert parse(data) == expected


@pytest.mark.parametrize(
    ("parse", "data", "least"),
    [
        (parse_ucred, UCRED, 12),
        (parse_xucred, XUCRED_FREEBSD, 76),
        (parse_cmsgcred, CMSGCRED, 84),
        (parse_sockcred2, SOCKCRED2, 28),
    ],
    ids=["ucred", "xucred", "cmsgcred", "sockcred2"],
)
def test_truncated_structures(parse: Parser, data: bytes, least: int) -> None:
    for size in range(least):
        with pytest.raises(ProtocolError, match=f"truncated credentials: {size} of the"):
            parse(data[:size])
    for size in range(least, len(data) + 1):
        assert isinstance(parse(data[:size]), Credentials)


def test_a_structure_of_another_version() -> None:
    with pytest.raises(ProtocolError, match="version 7"):
        parse_xucred(struct.pack("=I", 7) + XUCRED_MACOS[4:])


@pytest.mark.parametrize("count", [-1, 0, 16, 17, 32767])
def test_counts_of_groups_that_lie(count: int) -> None:
    short = struct.pack("=h", count)
    assert len(parse_xucred(XUCRED_MACOS[:8] + short + XUCRED_MACOS[10:]).groups) <= 15
    assert len(parse_cmsgcred(CMSGCRED[:16] + short + CMSGCRED[18:]).groups) <= 15
    integer = struct.pack("=i", count)
    assert len(parse_sockcred2(SOCKCRED2[:24] + integer + SOCKCRED2[28:]).groups) <= 1


LAYOUT = r"""
#include <stddef.h>
#include <stdio.h>
typedef unsigned int u; typedef int pid; /* uid_t, gid_t; pid_t */
struct xucred { u version; u uid; short ngroups; u groups[16];
                union { void *unused; pid cr_pid; }; };
struct cmsgcred { pid cpid; u uid; u euid; u gid; short ngroups; u groups[16]; };
struct sockcred2 { int version; pid cpid; u uid; u euid; u gid; u egid; int ngroups; u groups[1]; };
int main(void) {
  printf("%zu %zu %zu %zu %zu %zu\n", sizeof(struct xucred), offsetof(struct xucred, groups),
         offsetof(struct xucred, cr_pid), sizeof(struct cmsgcred),
         offsetof(struct cmsgcred, groups), offsetof(struct sockcred2, groups));
  return 0;
}
"""


def test_a_compiler_lays_the_structures_out_as_the_bytes_above(tmp_path: Path) -> None:
    compiler = shutil.which("cc")
    if compiler is None or struct.calcsize("P") != 8:
        pytest.skip("needs a C compiler for a 64-bit machine")
    source = tmp_path / "layout.c"
    source.write_text(LAYOUT)
    subprocess.run([compiler, "-o", tmp_path / "layout", source], check=True)
    out = subprocess.run([tmp_path / "layout"], capture_output=True, text=True, check=True).stdout
    assert [int(number) for number in out.split()] == [88, 12, 80, 84, 20, 28]
    assert len(XUCRED_FREEBSD) == 88
    assert PLATFORMS["freebsd"].attach_size == 84


def test_the_table_of_platforms() -> None:
    assert platform("freebsd14") is PLATFORMS["freebsd"]
    assert platform("darwin") is PLATFORMS["darwin"]
    assert platform("linux").sun_path == 108
    assert platform("freebsd13.2").sun_path == platform("darwin").sun_path == 104
    assert platform("plan9").peer is None


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's own numbers")
def test_the_row_of_linux_is_what_python_knows() -> None:
    here = PLATFORMS["linux"]
    assert here.peer is not None
    assert here.peer[:2] == (socket.SOL_SOCKET, socket.SO_PEERCRED)
    assert here.pass_credentials == (socket.SOL_SOCKET, socket.SO_PASSCRED)
    assert here.attach == socket.SCM_CREDENTIALS


def test_a_platform_without_means_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    # Another row of the table, which is data; the code that reads it is the real one.
    monkeypatch.setattr(module, "HERE", PLATFORMS["darwin"])
    with socket.socket(socket.AF_UNIX) as sock:
        with pytest.raises(UnsupportedPlatform, match="for connections only"):
            enable_credentials(sock)
        with pytest.raises(UnsupportedPlatform):
            module.control_message(None)
    assert peer_pidfd(sock) is None
    monkeypatch.setattr(module, "HERE", PLATFORMS["freebsd"])
    assert module.control_message(None) == (socket.SOL_SOCKET, 3, bytes(84))
    with pytest.raises(UnsupportedPlatform, match="fills in your own"):
        module.control_message(Credentials(1, 2, 3))
    monkeypatch.setattr(module, "HERE", platform("plan9"))
    with pytest.raises(UnsupportedPlatform, match="knows no call"):
        peer_credentials(sock)


def test_the_peer_of_a_pair_is_this_process() -> None:
    left, right = socket.socketpair()
    with left, right:
        assert peer_credentials(left) == own_credentials()
        pidfd = peer_pidfd(left)
        release = tuple(int(part) for part in os.uname().release.split(".")[:2])
        if sys.platform != "linux" or release < (6, 5):
            pytest.skip("this kernel has no SO_PEERPIDFD (Linux 6.5)")
        assert pidfd is not None
        with pidfd, open(f"/proc/self/fdinfo/{pidfd.fileno()}") as info:
            assert not os.get_inheritable(pidfd.fileno())
            assert f"Pid:\t{os.getpid()}\n" in info.read()


CONNECT_AS = """
    import os, sys
    from fdshare.kernel import cli_conn
    os.setgroups([int(group) for group in sys.argv[4:]])
    os.setresgid(*[int(sys.argv[3])] * 3)
    os.setresuid(*[int(sys.argv[2])] * 3)
    with cli_conn(sys.argv[1]) as conn:
        conn.recv(1)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
@pytest.mark.parametrize("groups", [[], [7, 8], list(range(1000, 1300))], ids=len)
def test_a_server_sees_who_connected(folder: Path, groups: list[int]) -> None:
    from fdshare.kernel import listen, serv_accept

    folder.chmod(0o711)
    with listen(folder / "s", mode=0o666) as listener:
        command = [
            sys.executable,
            "-c",
            textwrap.dedent(CONNECT_AS),
            folder / "s",
            "65534",
            "65533",
        ]
        child = subprocess.Popen([*command, *map(str, groups)])
        listener.socket.settimeout(20)
        conn, who = serv_accept(listener)
        with conn:
            assert who == Credentials(child.pid, 65534, 65533, tuple(groups))
            pidfd = peer_pidfd(conn)
            conn.send(b"x")
        assert child.wait(20) == 0
        if pidfd is not None:
            pidfd.close()
