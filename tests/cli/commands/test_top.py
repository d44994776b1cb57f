"""top, and coloured output: in a real terminal, which tmux is."""

from __future__ import annotations

import io
import pty
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from commandline import Shell
from rich.console import Console

from fdshare.cli.commands.top import View, _event_line
from fdshare.protocol import messages as m
from fdshare.protocol.messages import DescriptorInfo, EntryInfo, Registrant, ServerStats


class Terminal:
    """A terminal of 80 by 24 with one command in it."""

    def __init__(self, shell: Shell, folder: Path) -> None:
        self.tmux = ["tmux", "-S", str(folder / "tmux"), "-f", "/dev/null"]
        self.env = {**shell.environment, "TERM": "xterm-256color"}
        del self.env["NO_COLOR"]

    def start(self, *words: str, width: int = 80) -> None:
        command = shlex.join([sys.executable, "-m", "fdshare", *words])
        # What the command printed last stays on the screen until the terminal is closed.
        script = f"trap : INT; {command}; echo status $?; exec cat"
        self._run(
            "new-session", "-d", "-x", str(width), "-y", "24", "sh", "-c", script, env=self.env
        )

    def screen(self, *, escapes: bool = False) -> str:
        return self._run("capture-pane", "-p", *(["-e"] if escapes else []))

    def press(self, *keys: str) -> None:
        self._run("send-keys", *keys)

    def resize(self, width: int, height: int) -> None:
        self._run("resize-window", "-x", str(width), "-y", str(height))

    def close(self) -> None:
        subprocess.run([*self.tmux, "kill-server"], capture_output=True)

    def _run(self, *words: str, env: dict[str, str] | None = None) -> str:
        done = subprocess.run(
            [*self.tmux, *words], env=env, capture_output=True, text=True, timeout=30
        )
        assert done.returncode == 0, done
        return done.stdout


@pytest.fixture
def terminal(fdshare: Shell, folder: Path) -> Iterator[Terminal]:
    if shutil.which("tmux") is None:
        pytest.skip("tmux is not installed")
    terminal = Terminal(fdshare, folder)
    yield terminal
    terminal.close()


Until = Callable[..., object]


def test_ls_is_coloured_and_fits(fdshare: Shell, terminal: Terminal, until: Until) -> None:
    fdshare("register", "web", "--listen", "tcp://127.0.0.1:0")
    fdshare("register", "a" * 60, "--memory", "/dev/null")
    terminal.start("ls")
    until(lambda: "status 0" in terminal.screen(), "ls is done")
    screen = terminal.screen()
    head, memory, web, *_ = screen.splitlines()
    assert head.startswith("NAME")
    assert "…" in memory
    assert memory.rstrip().endswith("-")
    assert "tcp 127.0.0.1:" in web
    # Bold titles, names in cyan.
    coloured = terminal.screen(escapes=True)
    assert "\x1b[1mNAME" in coloured
    assert "\x1b[36mweb" in coloured


def test_top_shows_what_happens(fdshare: Shell, terminal: Terminal, until: Until) -> None:
    fdshare("register", "web", "--listen", "tcp://127.0.0.1:0")
    terminal.start("top", "--interval", "0.1")
    until(lambda: "listening 0/4096" in terminal.screen(), "the table is drawn")
    screen = terminal.screen()
    assert "fdshare pid " in screen
    assert "a second: " in screen
    assert "q quit" in screen
    fdshare("register", "alpha", "--memory", "/dev/null")
    until(lambda: "registered alpha" in terminal.screen(), "the event is shown")
    fdshare("rm", "alpha")
    until(lambda: "unregistered alpha" in terminal.screen(), "the event is shown")
    until(lambda: "1 names" in terminal.screen(), "the count is shown")
    terminal.press("q")
    until(lambda: "status 0" in terminal.screen(), "q quits")


def rows(screen: str) -> list[str]:
    lines = screen.splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith("NAME"))
    return [line.split()[0] for line in lines[start + 1 :] if "memory" in line]


def test_top_sorts_and_filters(fdshare: Shell, terminal: Terminal, until: Until) -> None:
    for name in ("one", "two", "three"):
        fdshare("register", name, "--memory", "/dev/null")
    fdshare("fetch", "two", "--cat")
    terminal.start("top", "--interval", "0.1")
    until(lambda: "three" in terminal.screen(), "the table is drawn")
    assert rows(terminal.screen()) == ["one", "three", "two"]
    terminal.press("u")
    until(lambda: rows(terminal.screen())[0] == "two", "u sorts by uses")
    terminal.press("n")
    until(lambda: rows(terminal.screen()) == ["one", "three", "two"], "n sorts by name")
    terminal.press("n")
    until(lambda: rows(terminal.screen()) == ["two", "three", "one"], "n again turns it round")
    terminal.press("/", "t", "h")
    until(lambda: rows(terminal.screen()) == ["three"], "a filter while it is typed")
    terminal.press("Enter")
    until(lambda: "only *th*" in terminal.screen(), "the filter stays")
    terminal.press("/", "Escape")
    until(lambda: len(rows(terminal.screen())) == 3, "escape drops the filter")
    terminal.press("q")
    until(lambda: "status 0" in terminal.screen(), "q quits")


def test_top_outlives_the_server(fdshare: Shell, terminal: Terminal, until: Until) -> None:
    terminal.start("top", "--interval", "0.1")
    until(lambda: "q quit" in terminal.screen(), "the table is drawn")
    fdshare("stop")
    until(lambda: "the server at" in terminal.screen(), "it says that the server is gone")
    terminal.resize(60, 12)
    terminal.press("C-c")
    until(lambda: "status 130" in terminal.screen(), "it ends")


def test_top_needs_a_terminal(fdshare: Shell) -> None:
    assert "top needs a terminal" in fdshare.fails("top", status=2)


# The view, without a terminal.

STATS = ServerStats(1, 2, True, 60.0, 1, 1, 0, 1, 0, 1, 1, {"requests": 10, "fetched": 0}, {})


def entry(name: str, fetches: int = 0, age: float = 0.0, uid: int = 0) -> EntryInfo:
    return EntryInfo(name, 1, "socket", Registrant(1, uid, 0), age, 1, fetches=fetches)


def test_top_says_what_a_dumb_terminal_lacks(fdshare: Shell) -> None:
    ours, theirs = pty.openpty()
    with open(ours, "rb"), open(theirs, "wb") as terminal:
        status, errors = ended(fdshare, stdin=terminal, stdout=terminal, env={"TERM": "dumb"})
    assert status == 2
    assert "TERM says that this one cannot" in errors


def ended(shell: Shell, **options: Any) -> tuple[int, str]:
    """Status and standard error of `top`."""
    process = shell.start("top", stderr=subprocess.PIPE, **options)
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


def test_rates_are_per_second() -> None:
    view = View()
    view.sample([], STATS, 100.0)
    assert view.rates == {}
    view.sample([], ServerStats(*(*tuple_of(STATS)[:11], {"requests": 30}, {})), 104.0)
    assert view.rates == {"requests": 5.0}


def tuple_of(stats: ServerStats) -> tuple[object, ...]:
    return tuple(getattr(stats, field) for field in stats.__struct_fields__)


def test_orders() -> None:
    view = View()
    view.sample([entry("b", 5, 1.0), entry("a", 1, 3.0), entry("c", 9, 2.0)], STATS, 0.0)
    for key, names in {"n": "cba", "u": "cba", "a": "bca"}.items():
        view.press(key)
        assert [e.name for e in view.shown()] == list(names)
    view.press("a")
    assert [e.name for e in view.shown()] == ["a", "c", "b"]


def test_typing_a_filter() -> None:
    view = View()
    view.sample([entry("web"), entry("q")], STATS, 0.0)
    for key in ("/", "w", "x", "\x7f"):
        view.press(key)
    assert (view.typing, view.pattern, view.quit) == (True, "w", False)
    assert [e.name for e in view.shown()] == ["web"]
    view.press("q")
    assert (view.pattern, view.quit) == ("wq", False)
    view.press("\r")
    view.press("q")
    assert view.quit


def test_ctrl_c_always_quits() -> None:
    view = View()
    view.press("/")
    view.press("\x03")
    assert view.quit


def test_an_event_may_come_while_it_draws() -> None:
    """Another thread follows the events."""
    view = View()

    class Line(str):
        def translate(self, table: Any) -> str:  # called when it is drawn
            view.events.append("another")
            return super().translate(table)

    view.events.append(Line("one"))
    view.events.append("two")
    view.draw(80, 24)


def test_what_others_chose_is_drawn_as_text() -> None:
    """No terminal obeys it, and it is no markup."""
    evil = "[red]\x1b]0;owned\x07\x1b[31m\nforged\x85\u202e"
    view = View()
    hostile = msgspec.structs.replace(entry(evil), kind=evil, metadata={evil: evil})
    descriptor = DescriptorInfo("file", path=evil, health=evil)
    view.sample([msgspec.structs.replace(hostile, descriptors=[descriptor])], STATS, 0.0)
    for event in (m.Event(1, "registered", evil, 1), m.Event(2, "registered", evil, 2, old=evil)):
        view.events.append(_event_line(event))
    screen = io.StringIO()
    Console(file=screen, width=300).print(view.draw(300, 24))
    lines = screen.getvalue().split("\n")
    assert len([line for line in lines if "forged" in line]) == 3
    assert all(line.isprintable() for line in lines)
    assert not any(line.startswith("forged") for line in lines)
