"""Activation: sd_listen_fds(3) and sd_notify(3), from both sides, and against systemd's own."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fdshare import activation
from fdshare.activation import (
    NotifySocket,
    check_fdname,
    child_environment,
    listen_fds,
    notify,
)
from fdshare.errors import InvalidArgument, InvalidName, UnsupportedPlatform

# What a service runs: descriptors from 3 on, variables as given; SELF is its pid.
CHILD = """
import fcntl, json, os, sys
spec = json.loads(sys.argv[1])
numbers = [fcntl.fcntl(n, fcntl.F_DUPFD, 50) for n in spec["fds"]]
for at in range(3, 3 + spec["places"]):
    try:
        os.close(at)
    except OSError:
        pass
for at, number in enumerate(numbers):
    os.dup2(number, 3 + at)
for key, value in spec["env"].items():
    os.environ[key] = value.replace("SELF", str(os.getpid()))
import fdshare.activation as activation
if "PIDFDID" in spec:
    os.environ["LISTEN_PIDFDID"] = str((activation.own_pidfd_id() or 0) + spec["PIDFDID"])
from fdshare.errors import FdshareError
try:
    passed = activation.listen_fds(unset_environment=spec.get("unset", True))
except FdshareError as error:
    print(json.dumps({"error": type(error).__name__, "left": "LISTEN_FDS" in os.environ}))
    sys.exit()
print(json.dumps({
    "fds": {k: [[d.fileno(), os.fstat(d.fileno()).st_ino] for d in v] for k, v in passed.items()},
    "inheritable": [os.get_inheritable(d.fileno()) for v in passed.values() for d in v],
    "left": sorted(k for k in os.environ if k.startswith("LISTEN_")),
}))
for descriptors in passed.values():
    for d in descriptors:
        d.detach()
"""


def service(count: int = 0, places: int = 10, **spec: object) -> tuple[dict, list[int]]:
    """What a child that was passed *count* descriptors says, and their inodes."""
    files = [os.memfd_create(f"passed{n}") for n in range(count)]
    try:
        spec |= {"fds": files, "places": places, "env": spec.get("env", {})}
        done = subprocess.run(
            [sys.executable, "-c", CHILD, json.dumps(spec)],
            pass_fds=files,
            capture_output=True,
            check=True,
            timeout=60,
        )
        return json.loads(done.stdout), [os.fstat(fd).st_ino for fd in files]
    finally:
        for fd in files:
            os.close(fd)


def test_descriptors_come_by_name_in_order_and_close_on_exec() -> None:
    env = {"LISTEN_PID": "SELF", "LISTEN_FDS": "3", "LISTEN_FDNAMES": "web:admin:web"}
    said, inodes = service(3, env=env)
    assert said["fds"] == {"web": [[3, inodes[0]], [5, inodes[2]]], "admin": [[4, inodes[1]]]}
    assert said["inheritable"] == [False] * 3
    assert said["left"] == []


def test_the_variables_stay_on_request() -> None:
    env = {"LISTEN_PID": "SELF", "LISTEN_FDS": "1"}
    said, inodes = service(1, env=env, unset=False)
    assert said["fds"] == {"unknown": [[3, inodes[0]]]}
    assert said["left"] == ["LISTEN_FDS", "LISTEN_PID"]


@pytest.mark.parametrize(
    "env",
    [
        {"LISTEN_FDS": "1"},
        {"LISTEN_PID": "1", "LISTEN_FDS": "1"},
        {"LISTEN_PID": "SELF"},
    ],
)
def test_what_is_meant_for_another_process_is_not_taken(env: dict[str, str]) -> None:
    said, _ = service(1, env=env)
    assert said == {"fds": {}, "inheritable": [], "left": []}


@pytest.mark.parametrize(("offset", "taken"), [(0, True), (1, False)])
def test_the_pidfd_id_must_match(offset: int, taken: bool) -> None:
    if activation.own_pidfd_id() is None:
        pytest.skip("pidfs came with Linux 6.9")
    said, _ = service(1, env={"LISTEN_PID": "SELF", "LISTEN_FDS": "1"}, PIDFDID=offset)
    assert bool(said["fds"]) is taken


@pytest.mark.parametrize("count", ["0", "-1", "text", "", "1_0", "99999999999999", "2147483647"])
def test_a_count_that_is_none_is_an_error(count: str) -> None:
    said, _ = service(1, env={"LISTEN_PID": "SELF", "LISTEN_FDS": count})
    assert said == {"error": "InvalidArgument", "left": False}


def test_a_count_that_is_not_that_of_the_names_is_an_error() -> None:
    env = {"LISTEN_PID": "SELF", "LISTEN_FDS": "2", "LISTEN_FDNAMES": "one"}
    assert service(2, env=env)[0]["error"] == "InvalidArgument"


@pytest.mark.parametrize("names", [{}, {"LISTEN_FDNAMES": "a:b"}])
@pytest.mark.parametrize("open_ones", [0, 1])
def test_a_closed_descriptor_is_an_error(open_ones: int, names: dict[str, str]) -> None:
    env = {"LISTEN_PID": "SELF", "LISTEN_FDS": "2", **names}
    assert service(open_ones, env=env)[0] == {"error": "ClosedDescriptor", "left": False}


def test_a_huge_count_without_names_is_refused_at_once() -> None:
    env = {"LISTEN_PID": "SELF", "LISTEN_FDS": "2147483644"}
    assert service(1, env=env)[0]["error"] == "ClosedDescriptor"


def test_a_pid_that_is_no_number_is_an_error() -> None:
    assert service(1, env={"LISTEN_PID": "me", "LISTEN_FDS": "1"})[0]["error"] == "InvalidArgument"


def test_a_child_environment_is_understood() -> None:
    env = child_environment(["web", ""])
    assert env["LISTEN_PID"] == str(os.getpid())
    assert (env["LISTEN_FDS"], env["LISTEN_FDNAMES"]) == ("2", "web:")
    assert env.get("LISTEN_PIDFDID") == (str(i) if (i := activation.own_pidfd_id()) else None)


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("web", True),
        ("", True),
        ("a b/c~", True),
        ("x" * 255, True),
        ("x" * 256, False),
        ("a:b", False),
        ("a\n", False),
        ("\x7f", False),
        ("größe", False),
    ],
)
def test_names_follow_systemd(name: str, allowed: bool) -> None:
    if allowed:
        assert check_fdname(name) == name
    else:
        with pytest.raises(InvalidName):
            check_fdname(name)


def test_outside_a_service_there_is_nothing_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("LISTEN_PID", "NOTIFY_SOCKET", "WATCHDOG_USEC"):
        monkeypatch.delenv(variable, raising=False)
    assert listen_fds() == {}
    assert notify("READY=1") is False
    assert activation.barrier() is False
    assert activation.watchdog_seconds() is None


# Notifications.


@pytest.fixture(params=["path", "long", "abstract"])
def manager(
    request: pytest.FixtureRequest, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> NotifySocket:
    if request.param == "abstract":
        address = f"@fdshare-test-{os.getpid()}"
    else:
        deep = folder / ("x" * 120 if request.param == "long" else "n")
        deep.mkdir()
        address = str(deep / "notify")
    with NotifySocket(address) as bound:
        monkeypatch.setenv("NOTIFY_SOCKET", bound.address)
        yield bound


def test_a_notification_arrives_with_its_sender(manager: NotifySocket) -> None:
    assert notify("READY=1\nSTATUS=up and running") is True
    got = manager.receive()
    assert got is not None
    assert got.says("READY=1")
    assert got.value("STATUS") == "up and running"
    assert got.value("MAINPID") is None
    assert got.sender is not None
    assert (got.sender.pid, got.sender.uid) == (os.getpid(), os.geteuid())


def test_the_variable_is_removed_on_request(manager: NotifySocket) -> None:
    assert notify("READY=1", unset_environment=True) is True
    assert notify("READY=1") is False


def test_stored_descriptors_arrive_with_their_name(manager: NotifySocket) -> None:
    fd = os.memfd_create("kept")
    try:
        assert activation.store("kept", [fd], poll=False)
        got = manager.receive()
        assert got is not None
        assert got.lines == ["FDSTORE=1", "FDNAME=kept", "FDPOLL=0"]
        assert os.fstat(got.descriptors[0].fileno()).st_ino == os.fstat(fd).st_ino
        got.close()
    finally:
        os.close(fd)
    assert activation.unstore("kept")
    assert manager.receive().lines == ["FDSTOREREMOVE=1", "FDNAME=kept"]


def test_a_bad_name_is_refused_before_it_is_sent(manager: NotifySocket) -> None:
    with pytest.raises(InvalidName):
        activation.store("a:b", [0])
    with pytest.raises(InvalidName):
        activation.unstore("a\nREADY=1")


def test_a_barrier_waits_for_the_manager(manager: NotifySocket) -> None:
    with pytest.raises(TimeoutError):
        activation.barrier(timeout=0.01)
    got = manager.receive()
    assert got.is_barrier
    got.close()
    code = "import fdshare.activation as a; print('sent', flush=True); print(a.barrier())"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "sent\n"
        got = manager.receive()
        assert got.is_barrier
        assert process.poll() is None
        got.close()
        assert process.stdout.readline() == "True\n"
    assert process.returncode == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may speak for another process")
def test_a_privileged_sender_speaks_for_another(manager: NotifySocket) -> None:
    notify("MAINPID=1", pid=1)
    assert manager.receive().sender.pid == 1


@pytest.mark.parametrize("datagram", [b"x" * 4097, b"READY=1\0STATUS=", b"STATUS=\xff"])
def test_what_systemd_refuses_is_refused(manager: NotifySocket, datagram: bytes) -> None:
    from fdshare.kernel.passing import send_fds
    from fdshare.kernel.unix_address import sockaddr

    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock,
        sockaddr(manager.address, exists=True) as name,
    ):
        send_fds(sock, [0], datagram, address=name)
    assert manager.receive() is None


@pytest.mark.parametrize(
    ("address", "error"),
    [
        ("relative", InvalidArgument),
        ("@", InvalidArgument),
        ("vsock:2:1234", UnsupportedPlatform),
        ("/nobody/is/there", OSError),
    ],
)
def test_an_address_that_is_none_is_an_error(
    monkeypatch: pytest.MonkeyPatch, address: str, error: type[Exception]
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    with pytest.raises(error):
        notify("READY=1")


def test_the_watchdog_is_for_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "2500000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    assert activation.watchdog_seconds() == 2.5
    monkeypatch.setenv("WATCHDOG_PID", "1")
    assert activation.watchdog_seconds() is None
    monkeypatch.delenv("WATCHDOG_PID")
    monkeypatch.setenv("WATCHDOG_USEC", "soon")
    with pytest.raises(InvalidArgument):
        activation.watchdog_seconds()


# systemd's own programs at the other end.


def _program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed (Debian: systemd)")
    return found


ACTIVATED = """
import socket
from fdshare import listen_fds
(name, [descriptor]), = listen_fds().items()
with descriptor.socket() as listener:
    connection, _ = listener.accept()
    with connection:
        connection.sendall(name.encode())
"""


def test_systemd_socket_activate_activates(folder: Path) -> None:
    path = str(folder / "s")
    activate = _program("systemd-socket-activate")
    command = [activate, "-l", path, "--fdname=web", sys.executable, "-c", ACTIVATED]
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=_env()) as process:
        try:
            assert b"Listening" in process.stderr.readline()
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(path)
                assert client.recv(100) == b"web"
            process.stderr.read()
            assert process.wait(30) == 0
        finally:
            process.kill()


def test_systemd_notify_is_understood(manager: NotifySocket) -> None:
    program = _program("systemd-notify")
    if len(manager.address) > 107:
        pytest.skip("systemd-notify takes no path longer than sun_path")
    # --no-block: it waits with a barrier otherwise, which nobody here would answer.
    subprocess.run([program, "--no-block", "--ready", "--status=hello"], check=True, timeout=30)
    got = manager.receive()
    assert got.says("READY=1")
    assert got.value("STATUS") == "hello"


def _env() -> dict[str, str]:
    """systemd-socket-activate passes PATH, TERM, COLORTERM, USER and HOME only."""
    return dict(os.environ)
