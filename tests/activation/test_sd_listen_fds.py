"""What is passed to a process at its start: sd_listen_fds(3), and systemd's own activation."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fdshare.activation.sd_listen_fds import (
    check_fdname,
    child_environment,
    listen_fds,
    own_pidfd_id,
)
from fdshare.errors import InvalidName

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
    if own_pidfd_id() is None:
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
    assert env.get("LISTEN_PIDFDID") == (str(i) if (i := own_pidfd_id()) else None)


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


def test_outside_a_service_nothing_is_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LISTEN_PID", raising=False)
    assert listen_fds() == {}


ACTIVATED = """
import socket
from fdshare import listen_fds
(name, [descriptor]), = listen_fds().items()
with descriptor.socket() as listener:
    connection, _ = listener.accept()
    with connection:
        connection.sendall(name.encode())
"""


@pytest.mark.skipif(
    shutil.which("systemd-socket-activate") is None,
    reason="no systemd-socket-activate (Debian: systemd)",
)
def test_systemd_socket_activate_activates(folder: Path) -> None:
    path = str(folder / "s")
    command = [
        "systemd-socket-activate",
        "-l",
        path,
        "--fdname=web",
        sys.executable,
        "-c",
        ACTIVATED,
    ]
    # It passes PATH, TERM, COLORTERM, USER and HOME on, and nothing else.
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=dict(os.environ)) as process:
        try:
            assert b"Listening" in process.stderr.readline()
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(path)
                assert client.recv(100) == b"web"
            process.stderr.read()
            assert process.wait(30) == 0
        finally:
            process.kill()
