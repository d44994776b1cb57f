"""Where Python, or the machine, is not as usual: all works, or the error says why not."""

from __future__ import annotations

import compileall
import os
import shutil
import subprocess
import sys
import zipapp
from pathlib import Path

import pytest
from conftest import wait_until

from fdshare.cli.main import _FAMILIES

ROOT = Path(__file__).parent.parent

# A server with both halves, its upgrade, a pool that starts interpreters, the private server.
PROGRAM = """\
import multiprocessing, socket
import fdshare

def main():
    near, far = socket.socketpair()
    with fdshare.Manager() as manager:
        manager.register("caf\\u00e9", near)
        manager.upgrade()
        manager.fetch("caf\\u00e9").close()
        names, info = manager.names(), manager.info("caf\\u00e9")
        assert names == ["caf\\u00e9"]
        assert info.descriptors[0].type == "socket"
    with fdshare.get_context("spawn").Pool(1) as pool:
        number = pool.apply(socket.socket.fileno, (near,))  # -OO leaves out what is in an assert
        assert number >= 0
    fdshare.install()
    queue = multiprocessing.get_context("fork").SimpleQueue()
    queue.put(near)
    with queue.get() as got:
        assert got.fileno() >= 0
    print("all of it works")

if __name__ == "__main__":
    main()
"""


def works(command: list[str], env: dict[str, str] | None = None) -> None:
    done = subprocess.run(
        command, env={**os.environ, **(env or {})}, capture_output=True, text=True, timeout=100
    )
    assert (done.stdout, done.stderr) == ("all of it works\n", "")


@pytest.fixture
def program(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command line of PROGRAM, without a folder to write to."""
    (folder / "program.py").write_text(PROGRAM)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return [sys.executable, str(folder / "program.py")]


ENVIRONMENTS = {
    "the C locale": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "no HOME": {"HOME": "/nonexistent", "XDG_RUNTIME_DIR": ""},
    "a HOME that cannot be written to": {"HOME": "/proc", "XDG_RUNTIME_DIR": ""},
    "without docstrings and assert": {"PYTHONOPTIMIZE": "2"},
}


@pytest.mark.parametrize("place", ENVIRONMENTS)
def test_an_odd_environment(program: list[str], place: str) -> None:
    works(program, ENVIRONMENTS[place])


@pytest.mark.parametrize("length", [100, 200, 255])
def test_a_long_tmpdir(program: list[str], folder: Path, length: int) -> None:
    """Longer than sun_path of unix(7), which has 108 bytes."""
    (temporary := folder / ("t" * length)).mkdir()
    works(program, {"TMPDIR": str(temporary)})
    wait_until(lambda: os.listdir(temporary) == [])  # the private server ends when it is idle


# Without docstrings (-OO).


def test_every_help_is_there_without_docstrings() -> None:
    code = (
        "import click; from fdshare.cli.main import commands\\n"
        "for name in ['', *commands.list_commands(None)]:\\n"
        "    command = commands.get_command(None, name) if name else commands\\n"
        "    with click.Context(command, info_name=name) as context:\\n"
        "        print(command.get_help(context))\\n"
    ).replace("\\n", "\n")
    said = [
        subprocess.run([sys.executable, *options, "-c", code], capture_output=True, check=True)
        for options in ([], ["-OO"])
    ]
    assert said[0].stdout == said[1].stdout
    assert said[0].stdout.count(b"Example") > len(_FAMILIES)


# In a zip file.


def test_a_program_in_a_zip_file(folder: Path) -> None:
    inside = "import sys, fdshare; assert fdshare.__file__.startswith(sys.path[0]), fdshare\n"
    works([sys.executable, str(zipped(folder, inside + PROGRAM))])


def test_the_command_line_in_a_zip_file(folder: Path) -> None:
    """Its units start it from there."""
    made = zipped(folder, (ROOT / "fdshare" / "__main__.py").read_text())
    command = [sys.executable, str(made)]
    units = folder / "units"
    subprocess.run([*command, "systemd-units", "--dir", units], check=True, capture_output=True)
    start = f"ExecStart={sys.executable} {made} serve "
    assert start in (units / "fdshare.service").read_text()
    path = str(folder / "s")
    try:
        for words in (["serve", "--detach"], ["upgrade"], ["stop"]):
            subprocess.run([*command, *words, "--path", path], check=True, stdout=subprocess.PIPE)
    finally:
        subprocess.run([*command, "stop", "--path", path], check=False, stderr=subprocess.PIPE)


def zipped(folder: Path, program: str) -> Path:
    """fdshare and *program* in one file."""
    (content := folder / "content").mkdir()
    # zipapp follows no symbolic link.
    shutil.copytree(
        ROOT / "fdshare", content / "fdshare", ignore=shutil.ignore_patterns("__pycache__")
    )
    (content / "__main__.py").write_text(program)
    # Each process would compile what it imports, for seconds on a machine at work.
    compileall.compile_dir(content, quiet=2, legacy=True)
    made = folder / "program.pyz"
    zipapp.create_archive(content, made)
    return made


# Without /proc.


def without_proc(code: str) -> subprocess.CompletedProcess[str]:
    """What *code* says where /proc is hidden."""
    script = f"mount -t tmpfs none /proc && exec {sys.executable} -c '{code}'"
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script], capture_output=True, text=True, timeout=60
    )
    if "unshare" in done.stderr or "mount" in done.stderr.partition("\n")[0].split(":")[0]:
        pytest.skip(f"no mount namespace here: {done.stderr.strip()}")
    return done


def test_a_keeper_without_proc_is_refused() -> None:
    done = without_proc("import fdshare; fdshare.Manager().start()")
    assert "UnsupportedPlatform: a keeper is not available here: no /proc" in done.stderr
    assert "--no-keeper" in done.stderr
    assert done.returncode == 1


def test_a_server_alone_works_without_proc() -> None:
    code = (
        "import fdshare, os, socket; near, far = socket.socketpair()\n"
        "with fdshare.Manager(keeper=False) as manager:\n"
        '    manager.register("a", near); manager.fetch("a").close(); manager.take("a").close()\n'
        '    manager.register("b", os.pipe()[0]); print(manager.info("b").descriptors[0].type)\n'
        "    with fdshare.connect(manager.address) as client:\n"
        '        client.register("c", near, lifetime="connection")\n'
        '    while "c" in manager.names(): pass\n'
        "near.close(); far.close()"
    )
    done = without_proc(code)
    assert (done.stdout, done.stderr) == ("pipe\n", "")


def test_a_program_in_the_background_without_proc_is_refused() -> None:
    code = (
        "import fdshare, subprocess, sys\n"
        "with fdshare.Manager(keeper=False) as manager:\n"
        '    command = [sys.executable, "-m", "fdshare", "run", "--path", manager.address]\n'
        '    words = ["--notify", "--detach", "web=tcp://127.0.0.1:0", "--", "sleep", "9"]\n'
        "    print(subprocess.run([*command, *words]).returncode, manager.names())"
    )
    done = without_proc(code)
    assert "background is not available here: no /proc: mount it" in done.stderr
    assert done.stdout == "1 ['web']\n"
