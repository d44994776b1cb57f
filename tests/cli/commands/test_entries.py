"""register, fetch, take, rm, mv: from a shell, to a program."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest
from breaking import Halves
from commandline import FDSHARE, Shell
from conftest import wait_until

from fdshare import connect
from fdshare.cli.support.claim import Claim
from fdshare.cli.support.old_version import catches
from fdshare.kernel.ancillary import close_all


@pytest.fixture
def file(folder: Path) -> Path:
    path = folder / "data"
    path.write_text("hello\nworld\n")
    return path


def test_a_file_is_registered_and_copied_from(fdshare: Shell, file: Path) -> None:
    made = fdshare.json("register", "data", "--open", file)
    assert made == {"name": "data", "generation": 1}
    assert fdshare("fetch", "data", "--cat") == "hello\nworld\n"
    # The offset, which all holders share, has not moved.
    assert fdshare("fetch", "data", "--cat") == "hello\nworld\n"


def test_a_program_gets_the_descriptor(fdshare: Shell, file: Path) -> None:
    fdshare("register", "data", "--open", file)
    script = 'read line <&{data}; echo "$line $LISTEN_FDS $LISTEN_FDNAMES"'
    assert fdshare("fetch", "data", "--", "sh", "-c", script) == "hello 1 data\n"
    # The next reads on where the last one ended: one open file description.
    assert fdshare("fetch", "data", "--", "sh", "-c", "cat <&{data}") in ("world\n", "")


def test_a_descriptor_of_the_shell(fdshare: Shell, file: Path) -> None:
    with open(file) as stream:
        number = stream.fileno()
        fdshare("register", "data", "--fd", number, pass_fds=[number])
    assert fdshare.json("info", "data")["kind"] == "descriptor"
    assert fdshare("fetch", "data", "--cat") == "hello\nworld\n"
    line = fdshare.fails("register", "more", "--fd", "77", status=2)
    assert "descriptor 77 is not open" in line


def test_a_socket_of_the_shell_is_fetched_as_one(fdshare: Shell) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        number = listener.fileno()
        fdshare("register", "web", "--fd", number, pass_fds=[number])
        with connect(fdshare.path) as client, client.fetch("web") as copy:
            assert isinstance(copy, socket.socket)
            assert copy.getsockname() == listener.getsockname()


def test_memory_is_sealed(fdshare: Shell, file: Path) -> None:
    fdshare("register", "config", "--memory", file)
    file.write_text("changed")
    assert fdshare("fetch", "config", "--cat") == "hello\nworld\n"
    with connect(fdshare.path) as client:
        (descriptor,) = client.fetch_raw("config")
        with descriptor, pytest.raises(PermissionError):
            os.pwrite(descriptor.fileno(), b"!", 0)


def test_replacing(fdshare: Shell, file: Path) -> None:
    fdshare("register", "data", "--open", file)
    line = fdshare.fails("register", "data", "--open", file)
    assert "already held" in line
    assert "give --replace" in line
    fdshare("register", "data", "--open", file, "--replace")
    fdshare("register", "data", "--open", file, "--if-generation", "2")
    line = fdshare.fails("register", "data", "--open", file, "--if-generation", "2")
    assert "generation 3" in line


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--open", "/dev/null", "--fd", "0"], "give one of"),
        ([], "give one of"),
        (["--open", "/dev/null", "--mode", "x-ray"], "invalid mode"),
        (["--open", "/dev/null", "--meta", "novalue"], "KEY=VALUE"),
        (["--open", "/dev/null", "--grace", "3"], "--hold"),
    ],
)
def test_what_register_does_not_take(fdshare: Shell, words: list[str], reason: str) -> None:
    assert reason in fdshare.fails("register", "data", *words, status=2)


@pytest.mark.parametrize("verb", ["fetch", "take"])
def test_a_stream_that_is_non_blocking(fdshare: Shell, verb: str) -> None:
    """As every socket of asyncio: it ended in the middle, with an error of processes."""
    ours, theirs = socket.socketpair()
    with ours:
        with theirs, connect(fdshare.path) as client:
            theirs.setblocking(False)
            client.register("stream", theirs)
        process = fdshare.start(verb, "stream", "--cat")
        assert process.stdout is not None
        ours.sendall(b"one")
        assert process.stdout.read(3) == "one"
        ours.sendall(b"two")
        ours.shutdown(socket.SHUT_WR)
        assert process.communicate(timeout=60)[0] == "two"
        assert process.returncode == 0


def test_a_file_that_is_not_there(fdshare: Shell) -> None:
    line = fdshare.fails("register", "data", "--open", "/nothing/there")
    assert line == "fdshare: [Errno 2] No such file or directory: '/nothing/there'"


def test_hold_lasts_as_long_as_the_command(fdshare: Shell, file: Path, until) -> None:
    process = fdshare.start("register", "data", "--open", file, "--hold")
    fdshare("wait", "data", "--timeout", "30")
    assert fdshare.json("info", "data")["lifetime"] == "connection"
    process.terminate()
    until(lambda: fdshare.json("ls") == [], "the entry goes with its command")


@pytest.mark.parametrize("words", ["rm data", "register data --memory /dev/null --replace", "stop"])
def test_hold_ends_with_the_entry(fdshare: Shell, file: Path, words: str) -> None:
    """A supervisor sees that it holds nothing; it went on, and ended with status 0."""
    process = fdshare.start("register", "data", "--open", file, "--hold", stderr=subprocess.PIPE)
    fdshare("wait", "data", "--timeout", "30")
    fdshare(*words.split())
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (1, "fdshare: data is held no more\n")


def test_hold_goes_on_with_an_entry_that_is_given_back_or_renamed(shell: Shell, file: Path) -> None:
    shell.serve()
    process = shell.start("register", "data", "--open", file, "--hold", stderr=subprocess.PIPE)
    shell("wait", "data", "--timeout", "30")
    with connect(shell.path) as client:
        descriptors, claim = Claim.of(client, "data", 0)
        close_all(descriptors)
        claim.close()
        client.wait("data", timeout=30)
        client.rename("data", "other")
        Halves(client).kill("server")
        assert client.names() == ["other"]
        client.unregister("other")
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (1, "fdshare: data is held no more\n")


def test_hold_goes_on_at_a_signal_that_its_caller_ignores(
    fdshare: Shell, file: Path, until
) -> None:
    ignored = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process = fdshare.start("register", "data", "--open", file, "--hold")
    finally:
        signal.signal(signal.SIGHUP, ignored)
    fdshare("wait", "data", "--timeout", "30")  # before, it may have signals of who forked it
    until(lambda: catches(process.pid, signal.SIGTERM), "it waits for signals")
    process.send_signal(signal.SIGHUP)
    process.terminate()
    process.wait(60)
    assert process.returncode == 0


def test_take_is_once(fdshare: Shell, file: Path) -> None:
    fdshare("register", "job", "--open", file)
    assert fdshare("take", "job", "--", "sh", "-c", "cat <&{job}") == "hello\nworld\n"
    assert "nothing is held" in fdshare.fails("take", "job", "--cat")


@pytest.fixture
def broken(folder: Path) -> list[tuple[str, list[str], int]]:
    """Programs that look as if they could run: (what the message says, words, status)."""
    (folder / "plain").write_text("echo hello\n")
    (folder / "orphan").write_text("#!/nonexistent/interpreter\n")
    for name in ("plain", "orphan"):
        (folder / name).chmod(0o755)
    return [
        ("cannot be executed: Exec format error", [str(folder / "plain")], 126),
        ("its interpreter, or its loader, is missing", [str(folder / "orphan")], 126),
    ]


def test_take_gives_back_what_no_program_got(
    fdshare: Shell, file: Path, broken: list[tuple[str, list[str], int]]
) -> None:
    made = fdshare.json("register", "job", "--open", file)
    for reason, words, status in broken:
        assert reason in fdshare.fails("take", "job", "--", *words, status=status)
        (entry,) = fdshare.json("ls")
        assert (entry["generation"], entry["leased"]) == (made["generation"], False)
    for name in ("job:1", "jobs/ü", "tab name"):
        fdshare("register", name, "--open", file)
    assert "fdshare mv" in fdshare.fails("take", "job:1", "--", "cat")
    assert "fdshare mv" in fdshare.fails("take", "jobs/ü", "--", "cat")
    assert fdshare("take", "tab name", "--", "sh", "-c", "cat <&3") == "hello\nworld\n"
    left = ["job", "job:1", "jobs/ü"]
    # What confirms the take is a process of its own, which may be slower than the program.
    wait_until(lambda: [entry["name"] for entry in fdshare.json("ls")] == left)


def test_take_gives_back_what_could_not_be_written(fdshare: Shell, file: Path) -> None:
    fdshare("register", "job", "--open", file)
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*FDSHARE, "take", "job", "--cat"],
            env=fdshare.environment,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "No space left on device" in done.stderr
    assert fdshare("take", "job", "--cat") == "hello\nworld\n"
    assert fdshare.json("ls") == []


def test_a_stream_is_taken_once_its_first_bytes_were_written(fdshare: Shell) -> None:
    reads, writes = os.pipe()
    with open(reads, "rb"), open(writes, "wb", buffering=0) as writer:
        fdshare("register", "pipe", "--fd", reads, pass_fds=[reads])
        writer.write(b"one")
        process = fdshare.start("take", "pipe", "--cat")
        assert process.stdout is not None
        assert process.stdout.read(3) == "one"
        assert "nothing is held" in fdshare.fails("info", "pipe")
        writer.write(b"two")
        writer.close()
        assert process.stdout.read() == "two"
        assert process.wait(30) == 0


def test_a_take_that_somebody_else_ended_is_told(fdshare: Shell, file: Path) -> None:
    """What is printed slowly is leased for as long, and anybody may replace it."""
    file.write_bytes(b"x" * (1 << 20))
    fdshare("register", "job", "--open", file)
    process = fdshare.start("take", "job", "--cat", stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.read(1) == "x"
    fdshare("register", "job", "--open", file, "--replace")
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "it is not taken" in errors
    assert fdshare.json("info", "job")["generation"] == 2


def test_fetch_waits_for_the_name(fdshare: Shell, file: Path) -> None:
    process = fdshare.start("fetch", "late", "--cat", "--wait", "30")
    fdshare("register", "late", "--open", file)
    assert process.communicate(timeout=30)[0] == "hello\nworld\n"
    line = fdshare.fails("fetch", "never", "--cat", "--wait", "0.01")
    assert "nothing was registered under 'never' within" in line


def test_a_stream_is_copied_to_its_end(fdshare: Shell) -> None:
    reads, writes = os.pipe()
    with open(reads, "rb"), open(writes, "wb") as writer:
        fdshare("register", "pipe", "--fd", reads, pass_fds=[reads])
        writer.write(b"through the pipe")
        writer.close()
        assert fdshare("fetch", "pipe", "--cat") == "through the pipe"


def test_fetch_needs_something_to_do(fdshare: Shell) -> None:
    assert "--cat" in fdshare.fails("fetch", "web", status=2)
    assert "--cat" in fdshare.fails("fetch", "web", "--cat", "--", "true", status=2)
    assert "no such program" in fdshare.fails("take", "web", "--", "no-program-of-mine", status=127)


def test_rm_and_mv(fdshare: Shell, file: Path) -> None:
    fdshare("register", "one", "--open", file)
    fdshare("register", "two", "--open", file)
    fdshare("mv", "one", "three")
    assert [e["name"] for e in fdshare.json("ls")] == ["three", "two"]
    assert "already held" in fdshare.fails("mv", "two", "three")
    assert "generation" in fdshare.fails("rm", "two", "--if-generation", "1")
    fdshare("rm", "two", "three")
    assert fdshare.json("ls") == []


def test_rm_removes_the_others(fdshare: Shell, file: Path) -> None:
    for name in ("a", "b", "web/1", "web/2"):
        fdshare("register", name, "--open", file)
    done = fdshare.run("rm", "a", "nope", "b")
    assert done.returncode == 1
    assert done.stderr == "fdshare: nothing is held under 'nope'\n"
    assert [e["name"] for e in fdshare.json("ls")] == ["web/1", "web/2"]
    fdshare("rm", "--pattern", "web/*")
    assert fdshare.json("ls") == []
    assert "--pattern" in fdshare.fails("rm", status=2)


def test_mv_replaces_when_it_is_told_to(fdshare: Shell, file: Path) -> None:
    fdshare("register", "new", "--memory", file, "--meta", "version=2")
    fdshare("register", "web", "--open", os.devnull)
    fdshare("mv", "--replace", "new", "web")
    (entry,) = fdshare.json("ls")
    assert (entry["name"], entry["kind"]) == ("web", "memory")
    assert entry["metadata"] == {"version": "2"}
    fdshare("mv", "--replace", "web", "web")
    assert "nothing is held" in fdshare.fails("mv", "--replace", "nope", "web")
    assert [e["name"] for e in fdshare.json("ls")] == ["web"]


def test_signals_are_as_the_shell_left_them(fdshare: Shell, file: Path) -> None:
    """Python ignores SIGPIPE; a program that inherited that would not end with its reader."""
    fdshare("register", "data", "--open", file)
    script = "grep SigIgn /proc/self/status"
    said = fdshare("fetch", "data", "--", "sh", "-c", script)
    plain = subprocess.run(["sh", "-c", script], capture_output=True, text=True).stdout

    def ignored(line: str) -> int:
        return int(line.split()[1], 16) & 0x7FFFFFFF  # above are the C library's own

    assert ignored(said) == ignored(plain)
