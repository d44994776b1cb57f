"""run: LISTEN_FDS and its kin, placeholders, standard streams, exec."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from commandline import FDSHARE, Shell

from fdshare.activation import own_pidfd_id

TELL = """
import json, os, sys
fds = {}
for number in os.listdir("/proc/self/fd"):
    try:
        fds[number] = os.readlink(f"/proc/self/fd/{number}")
    except OSError:
        pass
variables = {k: v for k, v in os.environ.items() if k.startswith("LISTEN_")}
print(json.dumps({"env": variables, "pid": os.getpid(), "fds": fds, "argv": sys.argv[1:]}))
"""


def told(shell: Shell, *words: str, **options: object) -> dict:
    return json.loads(shell(*words, **options))


def test_a_name_is_bound_once_and_passed_from_3_on(fdshare: Shell) -> None:
    command = ["run", "web=tcp://127.0.0.1:0", "--", sys.executable, "-c", TELL, "{web}"]
    first, second = told(fdshare, *command), told(fdshare, *command)
    assert first["argv"] == ["3"]
    assert first["fds"]["3"].startswith("socket:")
    assert second["fds"]["3"] == first["fds"]["3"]
    # Nothing else was left to the program: 0-2, ours, and the folder it lists.
    assert set(first["fds"]) <= {"0", "1", "2", "3", "4"}


def test_the_variables_are_the_programs_own(fdshare: Shell) -> None:
    said = told(fdshare, "run", "web=tcp://127.0.0.1:0", "--", sys.executable, "-c", TELL)
    assert said["env"]["LISTEN_PID"] == str(said["pid"])
    assert said["env"]["LISTEN_FDS"] == "1"
    assert said["env"]["LISTEN_FDNAMES"] == "web"
    assert ("LISTEN_PIDFDID" in said["env"]) == (own_pidfd_id() is not None)


def test_listen_fds_understands_it(fdshare: Shell) -> None:
    code = (
        "import fdshare; p = fdshare.listen_fds();"
        "print({k: [d.fileno() for d in v] for k, v in p.items()});"
        "[d.close() for v in p.values() for d in v]"
    )
    names = ["b=tcp://127.0.0.1:0", "a=udp://127.0.0.1:0"]
    said = fdshare("run", *names, "--", sys.executable, "-c", code)
    assert said == "{'b': [3], 'a': [4]}\n"


def test_without_dashes(fdshare: Shell) -> None:
    said = told(fdshare, "run", "web=tcp://127.0.0.1:0", sys.executable, "-c", TELL, "--path", "x")
    assert said["argv"] == ["--path", "x"]
    said = told(fdshare, "run", "web", sys.executable, "-c", TELL)
    assert said["env"]["LISTEN_FDNAMES"] == "web"


def test_options_may_follow_the_names(fdshare: Shell) -> None:
    said = told(
        fdshare, "run", "web=tcp://127.0.0.1:0", "--wait", "1", "--", sys.executable, "-c", TELL
    )
    assert said["env"]["LISTEN_FDS"] == "1"


def test_several_descriptors_and_placeholders(fdshare: Shell) -> None:
    names = ["c=tcp://127.0.0.1:0", "x/y=tcp://127.0.0.1:0", "a=udp://127.0.0.1:0"]
    arguments = ["{a}", "fd://{x/y}", "{c}{c}", "{other}", "{}"]
    said = told(fdshare, "run", *names, "--", sys.executable, "-c", TELL, *arguments)
    assert said["argv"] == ["5", "fd://4", "33", "{other}", "{}"]


def test_the_program_finds_the_same_server(fdshare: Shell) -> None:
    command = ["run", "--path", fdshare.path, "web=tcp://127.0.0.1:0", "--"]
    env = {"FDSHARE_PATH": "/nobody/there"}
    assert "answered" in fdshare(*command, sys.executable, "-m", "fdshare", "ping", env=env)


def test_standard_streams(fdshare: Shell, folder: Path) -> None:
    (folder / "in").write_text("from a file\n")
    fdshare("register", "in", "--open", folder / "in")
    fdshare("register", "out", "--open", folder / "out", "--mode", "w")
    fdshare("register", "err", "--open", folder / "err", "--mode", "w")
    streams = ["--stdin", "in", "--stdout", "out", "--stderr", "err"]
    assert fdshare("run", *streams, "--", "sh", "-c", "cat; echo trouble >&2") == ""
    assert (folder / "out").read_text() == "from a file\n"
    assert (folder / "err").read_text() == "trouble\n"


def test_the_program_takes_our_place(fdshare: Shell) -> None:
    process = fdshare.start(
        "run", "web=tcp://127.0.0.1:0", "--", "sh", "-c", "echo $$; exec cat", stdin=subprocess.PIPE
    )
    assert process.stdout is not None
    assert int(process.stdout.readline()) == process.pid
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == -signal.SIGTERM
    done = fdshare.run("run", "web", "--", "sh", "-c", "exit 7")
    assert done.returncode == 7


def test_what_cannot_be_run(fdshare: Shell, folder: Path) -> None:
    plain = folder / "plain"
    plain.touch()
    assert "no such program" in fdshare.fails("run", "web", "no-such-thing", status=127)
    assert "cannot be executed" in fdshare.fails("run", "web", str(plain), status=126)
    assert "there is no CMD" in fdshare.fails("run", "web", status=2)
    assert "--notify" in fdshare.fails("run", "web", "--detach", "--", "true", status=2)
    assert "nothing is held under 'web'" in fdshare.fails("run", "web", "--", "true")
    assert "is not an address to bind" in fdshare.fails("run", "web=nonsense://1", "--", "true")


def test_wait_for_a_name_that_another_registers(fdshare: Shell) -> None:
    process = fdshare.start("run", "--wait", "60", "late", "--", "sh", "-c", "cat <&{late}")
    fdshare("register", "late", "--memory", "/proc/version")
    assert process.communicate(timeout=60)[0] == Path("/proc/version").read_text()


def test_an_address_that_changed_is_refused(fdshare: Shell) -> None:
    with socket.create_server(("127.0.0.1", 0)) as one:
        port = one.getsockname()[1]
    fdshare("run", f"web=tcp://127.0.0.1:{port}", "--", "true")
    assert fdshare.run("run", f"web=tcp://localhost:{port}", "--", "true").stderr == ""
    line = fdshare.fails("run", f"web=tcp://127.0.0.1:{port + 1}", "--", "true")
    assert f"it is at 127.0.0.1:{port}, not at tcp://127.0.0.1:{port + 1}" in line
    assert "--keep" in line
    both = ["run", "--keep", "--rebind", "web", "--", "true"]
    assert "one of" in fdshare.fails(*both, status=2)


def test_a_unix_socket(fdshare: Shell, folder: Path) -> None:
    path = folder / "app.sock"
    done = fdshare.run("run", f"app=unix://{path}", "--", "true")
    assert (done.returncode, done.stderr) == (0, "")
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))


def test_names_that_systemd_does_not_allow(fdshare: Shell) -> None:
    fdshare("register", "a:b", "--memory", "/dev/null")
    assert "colon" in fdshare.fails("run", "a:b", "--", "true")


def test_run_in_run_passes_the_inner_descriptors_alone(fdshare: Shell) -> None:
    outer = ["run", "a=tcp://127.0.0.1:0", "b=tcp://127.0.0.1:0", "--"]
    inner = [*FDSHARE, "run", "web=udp://127.0.0.1:0", "--", sys.executable, "-c", TELL]
    said = told(fdshare, *outer, *inner)
    assert said["env"]["LISTEN_FDNAMES"] == "web"
    assert set(said["fds"]) == {"0", "1", "2", "3"}


def test_a_wrapper_is_told_and_has_a_way_out(fdshare: Shell) -> None:
    words = ["run", "web=tcp://127.0.0.1:0", "--"]
    listen = "import fdshare; print(list(fdshare.listen_fds()))"
    wrapped = ["timeout", "60", sys.executable, "-c", listen]
    done = fdshare.run(*words, *wrapped)
    assert done.stdout == "[]\n"
    assert "--no-pid" in done.stderr
    script = f"LISTEN_PID=$$ exec {sys.executable} -c '{listen}'"
    said = fdshare("run", "--no-pid", *words[1:], "timeout", "60", "sh", "-c", script)
    assert said == "['web']\n"
    # Who passes the number needs no LISTEN_PID.
    fdshare(*words, "timeout", "60", "sh", "-c", "true <&{web}")


@pytest.mark.skipif(shutil.which("ss") is None, reason="ss (iproute2) is not installed")
def test_the_port_is_open_while_nobody_runs(fdshare: Shell) -> None:
    fdshare("run", "web=tcp://127.0.0.1:0", "--", "true")
    (entry,) = fdshare.json("ls")
    port = entry["descriptors"][0]["local"].rpartition(":")[2]
    said = subprocess.run(["ss", "-ltn"], capture_output=True, text=True, check=True).stdout
    assert f"127.0.0.1:{port} " in said
