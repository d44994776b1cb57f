"""The group of commands: help, exit status, errors, and how quickly it starts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from importlib import import_module
from typing import Any

import pytest
from commandline import FDSHARE, Shell

from fdshare.cli.main import _FAMILIES
from fdshare.version import __version__


def test_help_lists_every_command(shell: Shell) -> None:
    said = shell("--help")
    for command in _FAMILIES:
        assert f"\n  {command} " in said
    assert all(len(line) <= 80 for line in said.splitlines())


@pytest.mark.parametrize("command", list(_FAMILIES))
def test_every_command_has_help_with_an_example(shell: Shell, command: str) -> None:
    said = shell(command, "--help")
    assert "Example" in said
    assert f"fdshare {command}" in said
    assert all(len(line) <= 88 for line in said.splitlines())


def test_each_family_is_a_module_of_its_commands() -> None:
    for command, family in _FAMILIES.items():
        module = import_module(f"fdshare.cli.commands.{family}")
        assert getattr(module, command.replace("-", "_")).name == command


def test_version(shell: Shell) -> None:
    assert shell("--version").strip() == f"fdshare, version {__version__}"


def test_the_path_may_stand_before_the_command(fdshare: Shell) -> None:
    env = {"FDSHARE_PATH": "/nobody/there"}
    assert "answered" in fdshare("--path", fdshare.path, "ping", env=env)
    assert "answered" in fdshare("ping", "--path", fdshare.path, env=env)


@pytest.mark.parametrize(
    "words",
    [["--path", "", "stop"], ["serve", ""], ["serve", "--path", ""], ["serve", "--detach", ""]],
)
def test_an_empty_path_is_not_the_default_one(shell: Shell, words: list[str]) -> None:
    assert "is empty" in shell.fails(*words, status=2)


def test_no_server_is_status_69(shell: Shell) -> None:
    line = shell.fails("ls", status=69)
    assert line.startswith("fdshare: no server at ")
    assert "fdshare serve" in line


@pytest.mark.parametrize(
    "words", [["nonsense"], ["ls", "--nonsense"], ["rm"], ["explain"], ["serve", "--mode", "rw"]]
)
def test_bad_usage_is_status_2(shell: Shell, words: list[str]) -> None:
    line = shell.fails(*words, status=2)
    assert line.startswith("fdshare")
    assert "--help" in line


@pytest.mark.parametrize(("word", "hint"), [("ps", "ls"), ("lss", "ls"), ("wach", "watch")])
def test_a_command_that_is_none_is_told_what_was_meant(shell: Shell, word: str, hint: str) -> None:
    assert f"did you mean {hint}" in shell.fails(word, status=2)
    assert "did you mean" not in shell.fails("xyzzy", status=2)


def test_a_refusal_is_status_1(fdshare: Shell) -> None:
    assert fdshare.fails("rm", "web") == "fdshare: nothing is held under 'web'"


def test_a_reader_that_goes_away_is_no_traceback(fdshare: Shell) -> None:
    fdshare("register", "entry", "--memory", "/dev/null")
    process = fdshare.start("ls", "--json", stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    process.wait(30)


PRINTING = [
    "",
    "--version",
    "--help",
    "ls --help",
    "ls",
    "ls --json",
    "info entry",
    "who entry",
    "stats",
    "stats --prometheus",
    "doctor",
    "ping",
    "explain fetch entry",
    "dump",
    "fetch entry --cat",
    "watch --json",
    "completion bash",
    "manual",
    "systemd-units --dir .",
    "demo",
]


@pytest.mark.parametrize("words", PRINTING)
def test_a_full_disk_is_one_line(fdshare: Shell, words: str) -> None:
    fdshare("register", "entry", "--memory", "/proc/version")
    with open("/dev/full", "w") as full:
        status, errors = ended(fdshare, words, stdout=full)
    assert (status, errors) == (1, "fdshare: standard output: No space left on device\n")


@pytest.mark.parametrize("words", PRINTING)
def test_a_pipe_without_a_reader_is_no_message(fdshare: Shell, words: str) -> None:
    fdshare("register", "entry", "--memory", "/proc/version")
    reads, writes = os.pipe()
    os.close(reads)
    with open(writes, "w") as pipe:
        status, errors = ended(fdshare, words, stdout=pipe)
    assert (status, errors) == (1, "")


@pytest.mark.parametrize("words", [words for words in PRINTING if "--cat" not in words])
def test_a_non_blocking_pipe_that_is_full_is_one_line(fdshare: Shell, words: str) -> None:
    """It was said that too many processes run: fork(2) has the same error."""
    fdshare("register", "entry", "--memory", "/proc/version")
    reads, writes = os.pipe()
    with open(reads, "rb"), open(writes, "w") as pipe:
        os.set_blocking(writes, False)
        with suppress(BlockingIOError):
            while True:
                os.write(writes, bytes(1 << 16))
        status, errors = ended(fdshare, words, stdout=pipe)
    assert (status, errors) == (
        1,
        "fdshare: standard output: write could not complete without blocking\n",
    )


@pytest.mark.parametrize("words", ["", "--version", "ls", "stats --json", "ping", "doctor"])
def test_streams_that_are_closed_change_no_status(fdshare: Shell, words: str) -> None:
    """As /dev/null: a health check of cron tells the truth, and no socket gets their numbers."""
    fdshare("register", "entry", "--memory", "/proc/version")
    closed = "exec <&- >&- 2>&-; exec " + " ".join(FDSHARE)
    done = subprocess.run(["sh", "-c", f"{closed} {words}"], env=fdshare.environment, timeout=60)
    assert done.returncode == 0


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
@pytest.mark.parametrize("words", ["ls", "ls -q", "info", "ls --json", "dump", "watch --json"])
def test_what_the_encoding_of_the_output_does_not_have_is_escaped(
    fdshare: Shell, encoding: str, words: str
) -> None:
    name = "Grüße 世界 😀"
    fdshare("register", name, "--memory", "/proc/version", "--meta", "é=€")
    command = [*FDSHARE, *words.split(), *([name] if words == "info" else [])]
    environment = {**fdshare.environment, "PYTHONIOENCODING": encoding}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        if words == "watch --json":
            said = process.stdout.readline()
            process.terminate()
        else:
            said, errors = process.communicate(timeout=60)
            assert (process.returncode, errors) == (0, b"")
    if words in ("ls --json", "dump", "watch --json"):
        assert said.isascii()
        assert name in str(json.loads(said))
    else:
        assert "\\u4e16\\u754c" in said.decode(encoding)


def test_a_health_check_without_output_tells_the_truth(shell: Shell) -> None:
    done = subprocess.run(
        ["sh", "-c", f"{' '.join(FDSHARE)} ping >&-"],
        env=shell.environment,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr.count("\n")) == (69, 1)


def test_without_a_command_it_is_the_help(shell: Shell) -> None:
    assert shell() == shell("--help")


def ended(shell: Shell, words: str, **options: Any) -> tuple[int, str]:
    """Status and standard error of a command."""
    process = shell.start(*words.split(), stderr=subprocess.PIPE, cwd=shell.folder, **options)
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


def test_ctrl_c_while_it_starts_is_no_traceback() -> None:
    code = (
        "import sys\n"
        "class Interrupted:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name == 'click': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupted())\n"
        "from fdshare.__main__ import main; sys.exit(main())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (130, b"")


def test_the_commands_import_neither_rich_nor_anyio(fdshare: Shell) -> None:
    code = (
        "import sys; from fdshare.cli.main import run; run(['ls']);"
        "print([m for m in ('rich', 'anyio', 'dill', 'numpy', 'asyncio') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=fdshare.environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_full_descriptor_table_has_the_limit_named(fdshare: Shell) -> None:
    words = [
        "bash",
        "-c",
        'ulimit -n 9; exec "$@"',
        "bash",
        *FDSHARE,
        "deploy",
        "a=tcp://127.0.0.1:0",
    ]
    done = subprocess.run(
        [*words, "--", "sleep", "60"], env=fdshare.environment, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "RLIMIT_NOFILE of the command is 9, all in use" in done.stderr


def test_a_caller_that_ignores_the_end_of_its_children(shell: Shell) -> None:
    """As a shell after `trap '' CHLD`: exec(3) keeps that, and there was no child to wait for."""

    def ignore() -> None:
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)

    for words in (
        ["serve", "--detach"],
        ["register", "job", "--memory", "/proc/version"],
        ["take", "job", "--", "true"],
        ["run", "--notify", "w=tcp://127.0.0.1:0", "--", "true"],
        ["stop"],
    ):
        done = subprocess.run(
            [*FDSHARE, *words], env=shell.environment, timeout=60, preexec_fn=ignore
        )
        assert done.returncode == 0, words
