"""Every program of examples/classic runs as a real process and shows what its docstring shows.

Those in C are the other side of those in Python: each pair runs in all four combinations.
"""

from __future__ import annotations

import ast
import errno
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ending import terminated

from fdshare.errors import MagicMismatch, RemoteError
from fdshare.kernel import cli_conn, listen, recv_fd, recv_fds, send_err, send_fds

PROGRAMS = Path(__file__).parents[2] / "examples" / "classic"
ALL = sorted(path.name for path in PROGRAMS.glob("*.py"))
IN_C = sorted(path.name for path in (PROGRAMS / "c").glob("*_*.c"))
ENDINGS = [(".py", ".py"), (".py", ".c"), (".c", ".py"), (".c", ".c")]
BOTH = pytest.mark.parametrize(("server_is", "client_is"), ENDINGS)
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")

# Runs a program as uid 65534. What it imports is loaded before: that user may not read Python.
AS_NOBODY = """
import argparse, errno, fdshare.kernel, gettext, json, locale, os
import shutil, signal, socket, sys, traceback
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
sys.argv = sys.argv[1:]
with open(sys.argv[0]) as program:
    code = compile(program.read(), sys.argv[0], "exec")
exec(code, {"__name__": "__main__"})
"""


class Running:
    """A started program, its output read line by line."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.pid = process.pid
        self.seen: list[str] = []

    def line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().rstrip("\n")
        self.seen.append(line)
        return line

    def type(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text)
        self.process.stdin.flush()

    def finish(self) -> tuple[str, str]:
        """End of input; (the rest of its output, its errors)."""
        out, err = self.process.communicate(timeout=30)
        self.seen += out.splitlines()
        return out, err

    def stop(self) -> None:
        """Ctrl-C."""
        out, err = terminated(self.process)
        self.seen += out.splitlines()
        assert err == ""
        assert self.process.returncode == 0


Start = Callable[..., Running]


@pytest.fixture
def start(folder: Path, request: pytest.FixtureRequest) -> Iterator[Start]:
    """Starts a program of examples/classic, NAME.py or NAME.c, in *folder*."""
    started: list[subprocess.Popen[str]] = []

    def start(name: str, *arguments: object, nobody: bool = False, **options: object) -> Running:
        wrapper = ["-c", AS_NOBODY] if nobody else []
        command: list[object] = [sys.executable, "-W", "error", *wrapper, PROGRAMS / name]
        if name.endswith(".c"):
            command = [request.getfixturevalue("compiled") / name.removesuffix(".c")]
        process = subprocess.Popen(
            [*map(str, command), *map(str, arguments)],
            **{  # type: ignore[call-overload]
                "cwd": folder,
                "stdin": subprocess.PIPE,
                "stdout": subprocess.PIPE,
                "stderr": subprocess.PIPE,
                "text": True,
                **options,
            },
        )
        started.append(process)
        return Running(process)

    yield start
    # All of them first: a client may hold the pipe that is a server's output.
    for process in started:
        process.kill()
    for process in started:
        process.communicate()


def plain(line: str) -> str:
    """A line with the numbers that differ from run to run taken out."""
    return re.sub(r"\d+", "#", line.strip())


def assert_documented(name: str, lines: list[str]) -> None:
    """Each of *lines* stands in the transcript of the program's docstring."""
    docstring = ast.get_docstring(ast.parse((PROGRAMS / name).read_text()))
    assert docstring is not None
    transcript = {plain(line) for line in docstring.splitlines()}
    for line in filter(None, lines):
        assert plain(line) in transcript, f"not in the docstring of {name}"


@pytest.mark.parametrize("name", ALL)
def test_each_has_its_transcript(name: str) -> None:
    docstring = ast.get_docstring(ast.parse((PROGRAMS / name).read_text()))
    assert docstring is not None
    assert f"$ python {name}" in docstring


@pytest.mark.parametrize("name", ["hello_pipe.py", "hello_pipe.c"])
def test_hello_pipe(start: Start, name: str) -> None:
    program = start(name)
    out, err = program.finish()
    assert (out.splitlines()[-1], err) == ("hello, world!", "")
    assert f"parent {program.pid} received 'world!'" in out
    assert_documented("hello_pipe.py", program.seen)


def test_bind_name(start: Start, folder: Path) -> None:
    assert start("bind_name.py").finish() == ("UNIX domain socket bound to foo.socket\n", "")
    listing = subprocess.run(
        ["ls", "-l", folder / "foo.socket"], capture_output=True, text=True, check=True
    ).stdout
    assert listing.startswith("srw-------")

    second = start("bind_name.py")
    out, err = second.finish()
    assert (second.process.returncode, out) == (1, "")
    assert err.startswith("bind failed: Address already in use\n")
    assert_documented("bind_name.py", err.splitlines())

    inode = (folder / "foo.socket").stat().st_ctime_ns
    assert start("bind_name.py", "--reclaim").finish()[1] == ""
    assert (folder / "foo.socket").stat().st_ctime_ns != inode


def test_bind_name_says_how_to_reclaim_the_name_that_was_given(start: Start, folder: Path) -> None:
    name = "my socket"
    assert start("bind_name.py", name).finish()[1] == ""
    advice = start("bind_name.py", name).finish()[1].splitlines()[-1]
    assert advice.endswith("python bind_name.py --reclaim 'my socket'")
    assert "(rm 'my socket')" in advice


def test_bind_name_in_c(start: Start, folder: Path) -> None:
    assert start("bind_name.c").finish() == ("UNIX domain socket bound to foo.socket\n", "")
    assert oct((folder / "foo.socket").stat().st_mode) == "0o140700"
    second = start("bind_name.c")
    assert second.finish() == ("", "bind failed: Address already in use\n")
    assert second.process.returncode == 1
    # What the one leaves, the other takes over.
    assert start("bind_name.py", "--reclaim").finish()[1] == ""


def test_bind_name_never_takes_what_is_alive_or_no_socket(start: Start, folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(folder / "foo.socket"))
        sock.listen()
        alive = start("bind_name.py", "--reclaim")
        err = alive.finish()[1]
        assert alive.process.returncode == 1
        assert "Address already in use" in err
        assert f"pid {os.getpid()}" in err
    (folder / "file").write_text("precious")
    assert "a regular file, not a socket" in start("bind_name.py", "--reclaim", "file").finish()[1]
    assert (folder / "file").read_text() == "precious"
    assert "mkdir -p" in start("bind_name.py", "no/socket").finish()[1]


@BOTH
def test_stream(start: Start, folder: Path, server_is: str, client_is: str) -> None:
    server = start("stream_server" + server_is, "demo.socket")
    assert server.line() == "listening on demo.socket"
    clients = [start("stream_client" + client_is, "demo.socket") for _ in range(3)]
    said = {server.line() for _ in clients}
    who = f"uid {os.geteuid()}, gid {os.getegid()}"
    assert said == {f"connected: pid {client.pid}, {who}" for client in clients}
    # All are connected; the last is served first.
    for client in reversed(clients):
        client.type("good morning\n")
        assert client.line() == "GOOD MORNING"
        assert server.line() == f"pid {client.pid}: good morning"
        assert_documented("stream_client.py", client.seen)
    for client in clients:
        assert client.finish() == ("", "")
        assert server.line() == f"disconnected: pid {client.pid}"
    server.stop()
    assert_documented("stream_server.py", server.seen)
    assert not (folder / "demo.socket").exists()


CLIENTS = ["stream_client", "pass_fd_client", "pass_cred_client"]


@pytest.mark.parametrize("client", CLIENTS)
def test_a_client_without_a_server(start: Start, client: str) -> None:
    program = start(client + ".py", "demo.socket")
    said = program.finish()[1]
    assert "no server at" in said
    assert "fdshare serve" not in said, "its server is another program"
    assert program.process.returncode == 1
    program = start(client + ".c", "demo.socket")
    assert program.finish()[1] == "connect failed: No such file or directory\n"
    assert program.process.returncode == 1


@pytest.mark.parametrize("name", sorted({*ALL, *IN_C} - {"fd_to_many.py", "unix_and_tcp.py"}))
def test_without_an_argument(start: Start, name: str) -> None:
    program = start(name)
    out, err = program.finish()
    if name.startswith(("hello_", "bind_")):
        assert err == ""
    else:
        assert (program.process.returncode, out) == (2, "")
        assert err.startswith("usage: ")


@BOTH
def test_datagram(start: Start, folder: Path, server_is: str, client_is: str) -> None:
    server = start("datagram_server" + server_is, "demo.socket")
    assert server.line() == "bound to demo.socket"
    clients = [start("datagram_client" + client_is, "demo.socket") for _ in range(2)]
    for client in clients:
        assert client.line() == f"bound to client.{client.pid}"
    for client in clients:
        client.type("good morning\nand to you\n")
        assert client.line() == "GOOD MORNING"
        assert client.line() == "AND TO YOU"
        assert server.line() == f"12 bytes from client.{client.pid}: good morning"
        assert server.line() == f"10 bytes from client.{client.pid}: and to you"
    assert_documented("datagram_client.py", clients[0].seen[:2])
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as nameless:
        nameless.connect(str(folder / "demo.socket"))
        nameless.send(b"who am I?")
    assert server.line() == "no answer: the sender has no name"
    for client in clients:
        assert client.finish() == ("", "")
    server.stop()
    assert_documented("datagram_server.py", server.seen)
    assert os.listdir(folder) == (["demo.socket.lock"] if server_is == ".py" else [])


@BOTH
def test_pass_fd(start: Start, folder: Path, server_is: str, client_is: str) -> None:
    server = start("pass_fd_server" + server_is, "demo.socket")
    assert server.line() == "listening on demo.socket"
    client = start("pass_fd_client" + client_is, "demo.socket")
    assert client.line() == "client: descriptor 4 received."  # the lowest that is free
    assert server.line() == "descriptor sent"
    assert_documented("pass_fd_client.py", client.seen)
    client.type("this was typed at the client\n")
    assert server.line() == "this was typed at the client"
    assert client.finish() == ("", "")
    server.stop()
    assert_documented("pass_fd_server.py", server.seen)


@pytest.mark.parametrize("name", ["pass_fd_client", "pass_cred_client"])
def test_a_client_checks_the_magic(start: Start, folder: Path, name: str) -> None:
    for ending, said in ((".py", "expected the data"), (".c", "the peer is another program")):
        with listen(folder / "demo.socket") as listener:
            client = start(name + ending, "demo.socket")
            conn, _ = listener.accept()
            with conn:
                send_fds(conn, [1], b"\xcd", credentials=True)
            assert said in client.finish()[1]
            assert client.process.returncode == 1


@pytest.mark.parametrize("name", ["pass_fd_server", "pass_cred_server"])
def test_the_magic_of_a_server_is_checked(start: Start, folder: Path, name: str) -> None:
    server = start(name + ".c", "demo.socket")
    assert server.line() == "listening on demo.socket"
    with cli_conn(folder / "demo.socket") as conn:
        conn.settimeout(20)
        with pytest.raises(MagicMismatch, match="xab"):
            recv_fds(conn, 1, 1, expect=b"\xcd")
    server.line()
    server.stop()


def test_a_client_in_c_takes_no_second_descriptor(start: Start, folder: Path) -> None:
    """CMSG_SPACE of one has room for two; CMSG_LEN has not, and the kernel says MSG_CTRUNC."""
    with listen(folder / "demo.socket") as listener:
        client = start("pass_fd_client.c", "demo.socket")
        conn, _ = listener.accept()
        with conn:
            send_fds(conn, [1, 2], b"\xab")
        assert client.finish()[1] == "recvmsg failed: Message too long\n"


@pytest.mark.parametrize(
    ("nobody", "server_is", "client_is"),
    [(False, *pair) for pair in ENDINGS]
    + [pytest.param(True, ".py", client_is, marks=AS_ROOT) for client_is in (".py", ".c")],
)
def test_pass_cred(
    start: Start, folder: Path, nobody: bool, server_is: str, client_is: str
) -> None:
    if nobody:
        os.chown(folder, 65534, 65534)
    server = start("pass_cred_server" + server_is, "demo.socket", nobody=nobody)
    assert server.line() == "listening on demo.socket"
    client = start("pass_cred_client" + client_is, "demo.socket")
    uid, gid = (65534, 65534) if nobody else (os.geteuid(), os.getegid())
    assert server.line() == f"descriptor sent, pid {server.pid}, uid {uid}, gid {gid}"
    assert client.line() == f"client: received from pid {server.pid}, uid {uid}, gid {gid}"
    assert client.line() == "client: descriptor 4 received."
    assert_documented("pass_cred_client.py", client.seen)
    client.type("this was typed at the client\n")
    assert server.line() == "this was typed at the client"
    assert client.finish() == ("", "")
    server.stop()
    assert_documented("pass_cred_server.py", server.seen)


def test_pass_cred_with_a_client_that_threw_its_output_away(start: Start) -> None:
    server = start("pass_cred_server.py", "demo.socket")
    assert server.line() == "listening on demo.socket"
    client = start(
        "pass_cred_client.py", "demo.socket", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    client.type("this was typed at the client\n")
    lines = sorted([server.line(), server.line()])  # either may be first
    assert lines[0].startswith("descriptor sent, pid")
    assert lines[1] == "this was typed at the client"
    client.process.communicate(timeout=30)
    server.stop()
    assert_documented("pass_cred_server.py", server.seen)


@pytest.fixture
def reports(folder: Path) -> Path:
    """A folder with what may be asked for, and what lies in wait there."""
    (folder / "reports").mkdir()
    (folder / "reports" / "may.txt").write_text("Nothing happened in May.\n")
    (folder / "secret.txt").write_text("secret\n")
    (folder / "reports" / "link").symlink_to(folder / "secret.txt")
    (folder / "reports" / "good link").symlink_to("may.txt")
    os.mkfifo(folder / "reports" / "fifo")
    return folder / "reports"


def open_server(start: Start, *rules: str, mode: str = "600") -> Running:
    options = [part for rule in rules for part in ("--allow", rule)]
    server = start("open_server.py", "demo.socket", "--mode", mode, *options)
    assert server.line() == "listening on demo.socket"
    return server


def test_open_server(start: Start, reports: Path) -> None:
    uid = os.geteuid()
    server = open_server(start, f"{uid}:{reports}:ra")
    client = start("open_client.py", "demo.socket", "r", reports / "may.txt")
    assert client.finish() == ("Nothing happened in May.\n", "")
    assert server.line() == f"pid {client.pid}, uid {uid}: open r {reports}/may.txt: opened"

    client = start("open_client.py", "demo.socket", "a", reports / "may.txt")
    client.type("Nor in June.\n")
    assert client.finish() == ("", "")
    assert server.line() == f"pid {client.pid}, uid {uid}: open a {reports}/may.txt: opened"

    client = start("open_client.py", "demo.socket", "r", reports / "good link")
    assert client.finish() == ("Nothing happened in May.\nNor in June.\n", "")
    assert server.line().endswith("good link: opened")

    client = start("open_client.py", "demo.socket", "r", "/etc/shadow")
    out, err = client.finish()
    assert (client.process.returncode, out) == (1, "")
    assert err == f"open_client.py: no rule allows uid {uid} to open it for r (EACCES)\n"
    refused = server.line()
    assert_documented("open_client.py", err.splitlines())
    assert_documented("open_server.py", [refused, server.seen[0]])
    server.stop()


@pytest.mark.parametrize(("server_is", "client_is"), ENDINGS[1:])
def test_open_server_in_c(start: Start, reports: Path, server_is: str, client_is: str) -> None:
    uid = os.geteuid()
    if server_is == ".py":
        server = open_server(start, f"{uid}:{reports}:rwa")
    else:
        server = start("open_server.c", "demo.socket", reports, uid)
        assert server.line() == "listening on demo.socket"
    client = "open_client" + client_is
    asked = f"uid {uid}: open"
    assert start(client, "demo.socket", "r", reports / "may.txt").finish() == (
        "Nothing happened in May.\n",
        "",
    )
    assert server.line().endswith(f"{asked} r {reports}/may.txt: opened")
    for mode, text in (("a", "Nor in June.\n"), ("w", "July")):
        writer = start(client, "demo.socket", mode, reports / "may.txt")
        writer.type(text)
        assert writer.finish() == ("", "")
        assert server.line().endswith(f"{asked} {mode} {reports}/may.txt: opened")
    assert (reports / "may.txt").read_text() == "Julying happened in May.\nNor in June.\n"
    cases = {
        reports / "link": errno.EACCES,  # what counts is what the link leads to
        reports / ".." / "secret.txt": errno.EACCES,
        reports / "fifo": errno.EINVAL,
        reports / "no such": errno.ENOENT,
        Path("relative"): errno.EINVAL,
    }
    for path, status in cases.items():
        refused = start(client, "demo.socket", "r", path)
        out, err = refused.finish()
        assert (refused.process.returncode, out) == (1, "")
        assert f"({errno.errorcode[status]})" in err or f" (status {status})\n" in err
        assert "opened" not in server.line()
    server.stop()


def test_an_open_client_in_c_reads_an_answer_in_any_parts(start: Start, folder: Path) -> None:
    """And the status of the textbook, -5, is the same byte as 5."""
    (folder / "file").write_text("content\n")
    words = b"working on it\n"
    with listen(folder / "demo.socket") as listener, open(folder / "file") as file:
        for cut in range(1, len(words) + 2):
            client = start("open_client.c", "demo.socket", "r", "/any")
            conn, _ = listener.accept()
            with conn:
                assert conn.recv(100) == b"open r /any\0"
                whole = words + b"\0\0"
                file.seek(0)
                send_fds(conn, [file], whole[:cut])
                send_fds(conn, [], whole[cut:])
                assert client.finish() == ("content\n", words.decode())
        client = start("open_client.c", "demo.socket", "r", "/any")
        conn, _ = listener.accept()
        with conn:
            send_err(conn, -5, PermissionError("not yours"))
            assert client.finish() == ("", "PermissionError: not yours (status 5)\n")
        for broken in (b"", b"half\0", b"\0\0", b"\0\5more"):
            client = start("open_client.c", "demo.socket", "r", "/any")
            conn, _ = listener.accept()
            with conn:
                conn.sendall(broken)
                conn.shutdown(socket.SHUT_WR)
                assert client.finish()[1].endswith("open_client: no answer\n")
                assert client.process.returncode == 1


def test_open_server_gives_an_error_for_everything_else(start: Start, reports: Path) -> None:
    server = open_server(start, f"any:{reports}:r")
    cases = {
        ("r", reports / "link"): "(EACCES)",  # what counts is what the link leads to
        ("r", reports / ".." / "secret.txt"): "(EACCES)",
        ("r", reports / "fifo"): "not a regular file",
        ("r", reports): "not a regular file",
        ("w", reports / "may.txt"): "(EACCES)",
        ("r", reports / "no such"): "(ENOENT)",
        ("r", reports / "may.txt" / "x"): "(ENOTDIR)",
        ("r", "x" * 300): "does not start with /",
        ("r", "/" + "x" * 300): "(ENAMETOOLONG)",
        ("r", "/" + "x" * 6000): "EMSGSIZE",
    }
    for (mode, path), expected in cases.items():
        client = start("open_client.py", "demo.socket", mode, path)
        out, err = client.finish()
        assert (client.process.returncode, out) == (1, "")
        assert expected in err
    traced = start("open_client.py", "demo.socket", "--traceback", "r", reports / "no such")
    err = traced.finish()[1]
    assert "in open_allowed" in err
    assert "FileNotFoundError: [Errno 2]" in err
    server.stop()


REQUESTS = [
    (b"\0", errno.EINVAL),
    (b"open\0", errno.EINVAL),
    (b"open r\0", errno.EINVAL),
    (b"open x /etc/passwd\0", errno.EINVAL),
    (b"close r /etc/passwd\0", errno.EINVAL),
    (b"OPEN r /etc/passwd\0", errno.EINVAL),
    (b"open r relative\0", errno.EINVAL),
    (b"open r \0", errno.EINVAL),
    (b"open r /\xff\0", errno.EINVAL),
    (b"\xff\xfe\xfd\0", errno.EINVAL),
    (b"x" * 20_000, errno.EMSGSIZE),
    (b"open r /etc/pass", errno.EINVAL),  # and then the end
]


def test_open_server_answers_malformed_requests(start: Start, folder: Path) -> None:
    server = open_server(start)
    for request, status in REQUESTS:
        with cli_conn(folder / "demo.socket") as conn:
            conn.settimeout(20)
            conn.sendall(request)
            conn.shutdown(socket.SHUT_WR)
            with pytest.raises(RemoteError) as caught:
                recv_fd(conn)
        assert caught.value.status == status, request
        assert "refused" in server.line()
    server.stop()


def test_open_server_takes_several_requests_and_any_split(start: Start, reports: Path) -> None:
    server = open_server(start, f"any:{reports}:r")
    request = f"open r {reports}/may.txt\0".encode()
    with cli_conn(reports.parent / "demo.socket") as silent:  # holds nobody up
        with cli_conn(reports.parent / "demo.socket") as conn:
            conn.settimeout(20)
            for byte in request:
                conn.send(bytes([byte]))
            recv_fd(conn).close()
            conn.sendall(request * 3)
            for _ in range(3):
                recv_fd(conn).close()
        assert {plain(server.line()) for _ in range(4)} == {plain(server.seen[1])}
        silent.send(b"op")
    server.stop()


@AS_ROOT
def test_open_server_asks_the_kernel_who_asks(start: Start, reports: Path) -> None:
    reports.parent.chmod(0o711)
    (reports / "may.txt").chmod(0o600)
    server = open_server(start, f"65534:{reports}:r", mode="666")
    mine = start("open_client.py", "demo.socket", "r", reports / "may.txt")
    assert "no rule allows uid 0" in mine.finish()[1]
    theirs = start("open_client.py", "demo.socket", "r", reports / "may.txt", nobody=True)
    # A file that this user could not open by itself.
    assert theirs.finish() == ("Nothing happened in May.\n", "")
    server.line()
    assert server.line().startswith(f"pid {theirs.pid}, uid 65534: open r")
    server.stop()


@AS_ROOT
def test_open_server_without_the_mode_for_others(start: Start, reports: Path) -> None:
    reports.parent.chmod(0o711)
    server = open_server(start, f"65534:{reports}:r")
    theirs = start("open_client.py", "demo.socket", "r", reports / "may.txt", nobody=True)
    assert "uid 65534 may not connect" in theirs.finish()[1]
    server.stop()


@AS_ROOT
def test_open_server_in_c_asks_the_kernel_who_asks(start: Start, reports: Path) -> None:
    reports.parent.chmod(0o711)
    (reports / "may.txt").chmod(0o600)
    server = start("open_server.c", "demo.socket", reports, 65534)
    assert server.line() == "listening on demo.socket"
    mine = start("open_client.py", "demo.socket", "r", reports / "may.txt")
    assert "does not serve your uid (EACCES)" in mine.finish()[1]
    theirs = start("open_client.py", "demo.socket", "r", reports / "may.txt", nobody=True)
    assert theirs.finish() == ("Nothing happened in May.\n", "")
    server.line()
    assert server.line().startswith(f"pid {theirs.pid}, uid 65534: open r")
    server.stop()


def test_fd_to_many(start: Start) -> None:
    program = start("fd_to_many.py")
    out, err = program.finish()
    assert err == ""
    first, *workers, last = out.splitlines()
    assert first == f"parent {program.pid} opened a file of 5 records"
    assert last == f"parent {program.pid}, which read nothing, is at offset 45"
    found = [re.fullmatch(r"worker (\d+) read 'record (\d)' at offset (\d+)", w) for w in workers]
    assert len({match[1] for match in found if match}) == 5
    assert [int(match[2]) for match in found if match] == [0, 1, 2, 3, 4]
    assert [int(match[3]) for match in found if match] == [0, 9, 18, 27, 36]
    assert_documented("fd_to_many.py", program.seen)


def test_toy_rendezvous(start: Start, folder: Path) -> None:
    (folder / "notes.txt").write_text("the first line of notes.txt\n")
    server = start("toy_rendezvous.py", "demo.socket", "serve")
    assert server.line() == "listening on demo.socket"
    put = start("toy_rendezvous.py", "demo.socket", "put", "log", "notes.txt")
    assert put.finish() == ("", "")
    assert server.line() == f"put log, pid {put.pid}"
    (folder / "notes.txt").unlink()
    for text in ("the first line of notes.txt\n", ""):  # one offset: the second is at the end
        got = start("toy_rendezvous.py", "demo.socket", "get", "log")
        assert got.finish() == (text, "")
        assert server.line() == f"get log, pid {got.pid}"
    absent = start("toy_rendezvous.py", "demo.socket", "get", "other")
    assert absent.finish()[1] == "toy_rendezvous.py: nothing is held under other\n"
    assert absent.process.returncode == 1
    assert_documented("toy_rendezvous.py", server.seen)
    server.line()
    server.stop()


def test_unix_and_tcp(start: Start) -> None:
    """What is faster is not asserted: the machine has other work."""
    out, err = start("unix_and_tcp.py", "--short").finish()
    assert err == ""
    head, trip, throughput = out.splitlines()
    assert head.split() == ["what", "UNIX", "TCP", "UNIX", "is"]
    assert re.fullmatch(r"round trip( +[\d.]+ us){2} +[\d.]+ times as fast", trip)
    assert re.fullmatch(r"throughput( +[\d.]+ GB/s){2} +[\d.]+ times as fast", throughput)
