"""What a deploy waits for: a line that is rewritten on a terminal, one line each elsewhere."""

from __future__ import annotations

import os
import sys
import time

from fdshare.printable import printable

__all__ = ["Progress"]


class Progress:
    """Tells on standard error; of steps nothing if *quiet*.

    It never raises: a terminal that is gone ends no deploy in the middle.
    """

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._terminal = not quiet and sys.stderr.isatty()
        self._step = ""
        self._since = time.monotonic()

    def step(self, text: str) -> None:
        """It waits for *text* now; calling it again with the same text shows for how long."""
        if self._quiet:
            return
        if text != self._step:
            self._step, self._since = text, time.monotonic()
            if not self._terminal:
                _print(f"fdshare: {printable(text)}\n")
        if self._terminal:
            seconds = time.monotonic() - self._since
            _print(f"\r\33[Kfdshare: {printable(text)}, {seconds:.0f} s")

    def note(self, text: str) -> None:
        """A line that stays."""
        self.over()
        _print(f"fdshare: {printable(text)}\n")

    def over(self) -> None:
        """Nothing is waited for: other lines may be printed."""
        if self._terminal and self._step:
            _print("\r\33[K")
        self._step = ""


def _print(text: str) -> None:
    try:
        print(text, end="", file=sys.stderr, flush=True)
    except OSError:
        # Nobody reads it. What is kept of it would fail again at the end: status 120.
        os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), 2)
