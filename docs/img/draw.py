"""Draws the pictures of the README again: python docs/img/draw.py

Real commands against a real server, in a real terminal of 80 columns (tmux); rich makes an SVG of
what is then on the screen.
"""

from __future__ import annotations

import html
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.text import Text

HERE = Path(__file__).parent
FDSHARE = [sys.executable, "-m", "fdshare"]
COLUMNS = 80
CELL = 12.2  # width of a character, as rich draws it


class Studio:
    """A folder with a server that holds something worth seeing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tmux = ["tmux", "-S", str(folder / "tmux"), "-f", "/dev/null"]
        self.env = {
            **os.environ,
            "FDSHARE_PATH": str(folder / "fdshare.sock"),
            "PYTHONPATH": str(HERE.parent.parent),
            "TERM": "xterm-256color",
        }
        self.fdshare("run", "--start", "web=tcp://127.0.0.1:8080", "--", "true")
        self.fdshare("run", "admin=tcp://127.0.0.1:8081", "--", "true")
        log = folder / "app.log"
        log.write_text("x" * 1204)
        self.fdshare("register", "log", "--open", str(log), "--mode", "a")
        data = folder / "data"
        data.write_bytes(bytes(64 << 20))
        self.fdshare("register", "dataset", "--memory", str(data))
        self.fdshare("register", "token", "--open", "/dev/null", "--ttl", "3600")
        for _ in range(3):
            self.fdshare("fetch", "web", "--", "true")

    def fdshare(self, *words: str) -> None:
        subprocess.run([*FDSHARE, *words], env=self.env, check=True, stdout=subprocess.DEVNULL)

    def shoot(
        self,
        words: list[str],
        name: str,
        done: Callable[[str], bool],
        lines: int = 24,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> None:
        """A picture of the terminal once *done* says so of its text."""
        command = f"{shlex.join([*FDSHARE, *words])}; echo END; exec cat"
        size = ["-x", str(COLUMNS), "-y", str(lines)]
        self._tmux("new-session", "-d", *size, "sh", "-c", command)
        try:
            deadline = time.monotonic() + 120
            meanwhile()
            while not done(self._tmux("capture-pane", "-p")):
                if time.monotonic() > deadline:
                    raise SystemExit(f"{name}: {self._tmux('capture-pane', '-p')}")
                time.sleep(0.1)
            screen = self._tmux("capture-pane", "-p", "-e")
        finally:
            self._tmux("kill-server")
        text = screen.rstrip().removesuffix("END").rstrip()
        console = Console(record=True, width=COLUMNS, file=open(os.devnull, "w"))
        console.print(Text.from_ansi(text))
        title = f"fdshare {' '.join(words)}"
        (HERE / f"{name}.svg").write_text(self_contained(console.export_svg(title=title)))

    def _tmux(self, *words: str) -> str:
        done = subprocess.run(
            [*self.tmux, *words], env=self.env, check=True, capture_output=True, text=True
        )
        return done.stdout

    def close(self) -> None:
        self.fdshare("stop")


def self_contained(svg: str) -> str:
    """*svg* without the fonts that rich would load from elsewhere, each column at its own place: a
    font that is wider does not push the next column away."""
    svg = re.sub(r"\n *@font-face \{.*?\n    \}", "", svg, flags=re.DOTALL)
    svg = svg.replace("font-family: Fira Code, monospace", "font-family: ui-monospace, monospace")
    return re.sub(r'(<text [^>]*?)x="([\d.]+)" (y="[^"]*") textLength="[^"]*"([^>]*>)([^<]*)</text>',
                  _columns, svg)


def _columns(match: re.Match[str]) -> str:
    before, x, y, after, run = match.groups()
    text = html.unescape(run)
    if not text.strip():
        return ""
    pieces = re.finditer(r"\S+(?:\xa0\S+)*", text)
    return "".join(
        f'{before}x="{float(x) + CELL * piece.start():.1f}" {y} '
        f'textLength="{CELL * len(piece[0]):.1f}"{after}{html.escape(piece[0])}</text>'
        for piece in pieces
    )


def main() -> None:
    wanted = sys.argv[1:] or ["ls", "top", "demo"]
    with tempfile.TemporaryDirectory(prefix="fds-") as folder:
        studio = Studio(Path(folder))
        try:
            if "ls" in wanted:
                studio.shoot(["ls"], "ls", lambda screen: "END" in screen)
            if "top" in wanted:

                def traffic() -> None:
                    time.sleep(1.5)
                    studio.fdshare("register", "job/1", "--memory", "/dev/null")
                    studio.fdshare("take", "job/1", "--cat")
                    for _ in range(3):
                        studio.fdshare("fetch", "web", "--", "true")

                studio.shoot(
                    ["top", "--interval", "0.5"], "top", lambda s: "taken job/1" in s, 18, traffic
                )
            if "demo" in wanted:
                studio.shoot(["demo"], "demo", lambda screen: "END" in screen, 60)
        finally:
            studio.close()


if __name__ == "__main__":
    main()
