"""serve: signals, options, and a socket that a service manager passed."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from commandline import Shell
from conftest import wait_until

import fdshare
from fdshare.activation import NotifySocket


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("keeper", ["--keeper", "--no-keeper"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it(shell: Shell, number: signal.Signals, keeper: str) -> None:
    process = shell.serve(keeper)
    shell("register", "web", "--listen", "tcp://127.0.0.1:0")
    process.send_signal(number)
    assert process.wait(30) == 0
    assert not os.path.exists(shell.path)


def test_a_background_job_of_a_shell_hears_sigint(shell: Shell) -> None:
    """sh ignores SIGINT for what it starts with &; the server must not inherit that."""
    ignored = shell.serve(preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    ignored.send_signal(signal.SIGINT)
    assert ignored.wait(30) == 0


@pytest.mark.parametrize("keeper", ["--keeper", "--no-keeper"])
def test_it_says_once_where_it_serves(shell: Shell, keeper: str) -> None:
    process = shell.serve(keeper, "--log-level", "info", stderr=subprocess.PIPE)
    process.terminate()
    _, said = process.communicate(timeout=30)
    assert [line for line in said.splitlines() if "serving" in line] == [
        f"fdshare[{process.pid}] INFO: serving at {shell.path}"
    ]


@pytest.mark.parametrize("lock_too", [False, True])
@pytest.mark.parametrize("keeper", ["--keeper", "--no-keeper"])
def test_sighup_brings_a_path_back_that_is_gone(
    shell: Shell, until, keeper: str, lock_too: bool
) -> None:
    process = shell.serve(keeper, "--mode", "0640")
    shell("register", "web", "--listen", "tcp://127.0.0.1:0")
    with fdshare.connect(shell.path) as client, client.watch() as watch:
        next(watch)
        for path in [shell.path, f"{shell.path}.lock"][: 1 + lock_too]:
            os.unlink(path)
        process.send_signal(signal.SIGHUP)
        until(lambda: os.path.exists(shell.path), "the path")
        assert client.names() == ["web"]  # who was connected stays, or connects again
        assert watch.held.keys() == {"web"}
    assert stat.S_IMODE(os.stat(shell.path).st_mode) == 0o640
    assert [entry["name"] for entry in shell.json("ls")] == ["web"]
    assert "is in use" in shell.fails("serve", keeper)
    process.send_signal(signal.SIGHUP)  # nothing is wrong with it
    shell("ping")
    process.terminate()
    assert process.wait(30) == 0
    assert not os.path.exists(shell.path)


@pytest.mark.parametrize("keeper", ["--keeper", "--no-keeper"])
def test_sighup_leaves_what_somebody_put_on_the_path(shell: Shell, keeper: str) -> None:
    process = shell.serve(keeper, stderr=subprocess.PIPE)
    assert process.stderr is not None
    os.unlink(shell.path)
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(shell.path)
        process.send_signal(signal.SIGHUP)
        said = process.stderr.readline()
        assert f"something else is at {shell.path}, and stays; move it away" in said
        process.terminate()
        assert process.wait(30) == 0
        assert os.path.exists(shell.path)
    os.unlink(shell.path)


def test_a_second_one_on_the_path_is_refused(fdshare: Shell) -> None:
    line = fdshare.fails("serve")
    assert "is in use: a live server, pid " in line


def test_a_second_one_where_the_socket_was_removed_is_told_what_to_do(shell: Shell) -> None:
    """Not to stop the first one, which would lose what that holds."""
    process = shell.serve()
    shell("register", "held", "--open", "/dev/null")
    os.unlink(shell.path)
    signals = f"kill -HUP {process.pid} binds it again"
    assert signals in shell.fails("serve")
    assert signals in shell.fails("serve", "--detach")
    assert signals in shell("doctor", status=1)
    process.send_signal(signal.SIGHUP)
    wait_until(lambda: os.path.exists(shell.path))
    assert shell("ls", "-q") == "held\n"


def test_mode_and_group(shell: Shell) -> None:
    shell.serve("--no-keeper", "--mode", "0660", "--group", str(os.getegid()))
    info = os.stat(shell.path)
    assert stat.S_IMODE(info.st_mode) == 0o660
    assert info.st_gid == os.getegid()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives a file away")
def test_owner(shell: Shell) -> None:
    shell.serve("--no-keeper", "--mode", "600", "--owner", "65534")
    assert os.stat(shell.path).st_uid == 65534


def test_the_default_is_for_nobody_else(fdshare: Shell) -> None:
    assert stat.S_IMODE(os.stat(fdshare.path).st_mode) == 0o600


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--mode", "rw"], "not a mode"),
        (["--mode", "99"], "not a mode"),
        (["--limit", "nonsense=1"], "there is no limit 'nonsense'"),
        (["--limit", "max_names=many"], "not a number"),
        (["--group", "no-such-group"], "there is no group"),
        (["--ready-fd", "77"], "descriptor 77 is not open"),
        (["--metrics", "somewhere"], "HOST:PORT"),
    ],
)
def test_bad_options(shell: Shell, options: list[str], reason: str) -> None:
    assert reason in shell.fails("serve", *options, status=2)
    assert not os.path.exists(shell.path)


def test_a_bad_policy_says_where(shell: Shell, folder: Path) -> None:
    policy = folder / "policy.toml"
    policy.write_text('[[rule]]\neffect = "maybe"\n')
    line = shell.fails("serve", "--policy", policy)
    assert str(policy) in line
    assert not os.path.exists(shell.path)


def test_limits(shell: Shell) -> None:
    shell.serve("--no-keeper", "--limit", "max_names=3", "--limit", "lease_timeout=1.5")
    limits = shell.json("stats")["limits"]
    assert (limits["max_names"], limits["lease_timeout"]) == (3, 1.5)


def test_the_log_as_json(shell: Shell) -> None:
    process = shell.serve(
        "--no-keeper", "--log-format", "json", "--log-level", "info", stderr=subprocess.PIPE
    )
    shell("register", "web", "--memory", "/dev/null")
    assert process.stderr is not None
    assert json.loads(process.stderr.readline())["message"] == f"serving at {shell.path}"
    line = json.loads(process.stderr.readline())
    assert line["level"] == "info"
    assert line["verb"] == "register"
    assert line["entry"] == "web"
    assert line["uid"] == os.geteuid()


def test_metrics(shell: Shell, until) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shell.serve("--metrics", f"127.0.0.1:{port}")
    shell("register", "web", "--memory", "/dev/null")

    def names() -> str:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
                assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
                text: str = answer.read().decode()
        except OSError:
            return ""
        found = re.search(r"^fdshare_names (\d+)$", text, re.MULTILINE)
        return found[1] if found else ""

    assert names() == "1"
    os.kill(shell.json("stats")["server_pid"], signal.SIGKILL)
    until(lambda: names() == "1", "the successor serves them, too")


def test_an_authkey(shell: Shell, folder: Path) -> None:
    key = folder / "key"
    key.write_text("secret\n")
    shell.serve("--no-keeper", "--authkey-file", key)
    assert "authkey" in shell.fails("ls")
    assert shell("ls", env={"FDSHARE_AUTHKEY_FILE": str(key)})
    shell("stop", env={"FDSHARE_AUTHKEY_FILE": str(key)})


@pytest.mark.parametrize("text", ["", "\n"])
def test_an_empty_authkey_file_serves_nobody(shell: Shell, folder: Path, text: str) -> None:
    """An empty key would let everybody in."""
    (folder / "key").write_text(text)
    why = shell.fails("serve", "--no-keeper", "--authkey-file", folder / "key", status=2)
    assert "key is empty" in why


def test_a_path_that_is_not_utf8_is_refused(shell: Shell, folder: Path) -> None:
    before = os.listdir(folder)
    path = os.fsdecode(bytes(folder) + b"/caf\xe9")
    assert "the path is not UTF-8" in shell.fails("serve", path)
    assert os.listdir(folder) == before


# Under a service manager.


def test_it_reports_to_its_manager(shell: Shell, folder: Path) -> None:
    with NotifySocket(str(folder / "notify")) as manager:
        process = shell.serve(env={"NOTIFY_SOCKET": manager.address})
        said = manager.receive()
        assert said is not None
        assert said.says("READY=1")
        assert said.value("MAINPID") == str(process.pid)
        process.terminate()
        while (said := manager.receive()) is not None and not said.says("STOPPING=1"):
            pass
        assert process.wait(30) == 0


def test_it_feeds_the_watchdog(shell: Shell, folder: Path) -> None:
    with NotifySocket(str(folder / "notify")) as manager:
        shell.serve(env={"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "200000"})
        fed = 0
        while fed < 3:
            said = manager.receive()
            assert said is not None
            fed += said.says("WATCHDOG=1")


def test_a_new_keeper_is_announced(shell: Shell, folder: Path) -> None:
    with NotifySocket(str(folder / "notify")) as manager:
        process = shell.serve(env={"NOTIFY_SOCKET": manager.address})
        process.kill()
        while True:
            said = manager.receive()
            assert said is not None
            main = said.value("MAINPID")
            if main is not None and main != str(process.pid):
                break
        assert shell.json("stats")["keeper_pid"] == int(main)
        shell("stop")


PASS = """
import os, sys
path, number = sys.argv[1], int(sys.argv[2])
os.dup2(number, 3)
os.environ.update(LISTEN_FDS="1", LISTEN_PID=str(os.getpid()))
os.execv(sys.executable, [sys.executable, "-m", "fdshare", "serve", "--log-level", "warning"])
"""


def test_its_socket_may_be_passed(shell: Shell, folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(shell.path)
        listener.listen()
        number = listener.fileno()
        process = subprocess.Popen(
            [sys.executable, "-c", PASS, shell.path, str(number)],
            env=shell.environment,
            pass_fds=[number],
        )
    try:
        assert shell.json("stats")["redundant"] in (True, False)
    finally:
        process.terminate()
        assert process.wait(30) == 0
    # It is the manager's to remove.
    assert os.path.exists(shell.path)
    os.unlink(shell.path)


def test_systemd_socket_activate_starts_it(shell: Shell) -> None:
    program = shutil.which("systemd-socket-activate")
    if program is None:
        pytest.skip("systemd-socket-activate is not installed (Debian: systemd)")
    process = subprocess.Popen(
        [
            program,
            "-l",
            shell.path,
            "-E",
            "PYTHONPATH",
            sys.executable,
            "-m",
            "fdshare",
            "serve",
            "--log-level",
            "warning",
        ],
        env=shell.environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        assert "Listening" in process.stderr.readline()
        # The first client starts it.
        shell("register", "web", "--listen", "tcp://127.0.0.1:0")
        assert shell.json("stats")["keeper_pid"] == process.pid
        assert [entry["name"] for entry in shell.json("ls")] == ["web"]
        shell("stop")
        process.stderr.read()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.communicate()
        Path(shell.path).unlink(missing_ok=True)
