"""top: shows what is registered and what happens, live."""

from __future__ import annotations

import os
import select
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import click

from fdshare.cli.commands.ls import COLUMNS, row
from fdshare.cli.format import age, table_lines
from fdshare.cli.options import for_server
from fdshare.errors import FdshareError
from fdshare.printable import printable

if TYPE_CHECKING:
    from rich.console import RenderableType

    from fdshare.client.blocking.client import Client
    from fdshare.client.watch_state import WatchItem
    from fdshare.protocol.messages import EntryInfo, ServerStats

__all__ = ["top"]

_EVENTS: Final = 6  # the last ones are shown
# key -> (name of the order, sort key, whether the largest comes first)
_ORDERS: Final[dict[str, tuple[str, Callable[[EntryInfo], Any], bool]]] = {
    "n": ("name", lambda entry: entry.name, False),
    "a": ("age", lambda entry: entry.age, False),
    "u": ("uses", lambda entry: entry.fetches, True),
    "o": ("owner", lambda entry: entry.registrant.uid, False),
    "k": ("kind", lambda entry: entry.kind, False),
}
_ESCAPE: Final = "\x1b"
_ENTER: Final = ("\r", "\n")
_BACKSPACE: Final = ("\x7f", "\b")
_INTERRUPT: Final = ("\x03", "\x04")


@dataclass(slots=True)
class View:
    """The state of the screen. Pure: keys and samples in, a drawing out."""

    order: str = "n"
    reverse: bool = False
    pattern: str = ""
    typing: bool = False  # the pattern
    quit: bool = False
    entries: list[EntryInfo] = field(default_factory=list)
    stats: ServerStats | None = None
    rates: dict[str, float] = field(default_factory=dict)
    events: deque[str] = field(default_factory=lambda: deque(maxlen=_EVENTS))
    error: str = ""
    _sampled: tuple[float, dict[str, int]] | None = None

    def press(self, key: str) -> None:
        """Handles a key of the keyboard."""
        if key in _INTERRUPT:
            self.quit = True
        elif self.typing:
            self._type(key)
        elif key in ("q", _ESCAPE):
            self.quit = True
        elif key in _ORDERS:
            # The same key again reverses the order.
            self.reverse = not self.reverse if key == self.order else False
            self.order = key
        elif key == "/":
            self.typing, self.pattern = True, ""

    def _type(self, key: str) -> None:
        if key in _ENTER:
            self.typing = False
        elif key == _ESCAPE:
            self.typing, self.pattern = False, ""
        elif key in _BACKSPACE:
            self.pattern = self.pattern[:-1]
        elif key.isprintable():
            self.pattern += key

    def sample(self, entries: list[EntryInfo], stats: ServerStats, now: float) -> None:
        """Takes what the server answered at *now*; rates are per second since the last sample."""
        counters = dict(stats.counters)
        if self._sampled is not None and now > self._sampled[0]:
            then, former = self._sampled
            self.rates = {
                name: max(value - former.get(name, 0), 0) / (now - then)
                for name, value in counters.items()
            }
        self._sampled = now, counters
        self.entries, self.stats, self.error = entries, stats, ""

    def shown(self) -> list[EntryInfo]:
        """The entries that match the filter, in order."""
        from fdshare.protocol.names import matcher

        _, value, largest_first = _ORDERS[self.order]
        matches = matcher(f"*{self.pattern}*" if self.pattern else "*")
        found = [entry for entry in self.entries if matches(entry.name)]
        return sorted(found, key=value, reverse=largest_first != self.reverse)

    def draw(self, width: int, height: int) -> RenderableType:
        """The whole screen, for a terminal of that size."""
        from rich.console import Group
        from rich.text import Text

        events = self.events.copy()  # another thread adds to it
        room = max(height - 6 - len(events), 1)
        shown = self.shown()
        parts: list[RenderableType] = [self._head(), *self._table(shown[:room], width)]
        if len(shown) > room:
            parts.append(Text(f"... and {len(shown) - room} more", style="dim"))
        parts += [Text(line, style="dim", overflow="ellipsis", no_wrap=True) for line in events]
        parts.append(self._foot())
        return Group(*parts)

    def _head(self) -> RenderableType:
        from rich.text import Text

        if self.error or self.stats is None:
            return Text(self.error or "asking the server ...", style="red")
        stats = self.stats
        redundant = "redundant" if stats.redundant else "not redundant"
        line = Text.assemble(
            ("fdshare ", "bold"),
            f"pid {stats.server_pid}, up {age(stats.uptime)}, ",
            (redundant, "green" if stats.redundant else "yellow"),
            f"; {stats.names} names, {stats.descriptors} descriptors, "
            f"{stats.connections} connections",
        )
        words = [
            f"{self.rates.get(name, 0.0):,.1f} {name}"
            for name in ("requests", "fetched", "registered", "taken", "refused")
        ]
        return Text("\n").join([line, Text("a second: " + ", ".join(words))])

    def _table(self, entries: list[EntryInfo], width: int) -> Iterator[RenderableType]:
        from rich.text import Text

        head, *lines = table_lines(COLUMNS, [row(entry) for entry in entries], width, True)
        yield Text(Text.from_ansi(head).plain.ljust(width), style="bold reverse")
        for line in lines:
            yield Text.from_ansi(line)

    def _foot(self) -> RenderableType:
        from rich.text import Text

        if self.typing:
            return Text(f"show names with: {self.pattern}_", style="bold")
        order = _ORDERS[self.order][0] + (", reversed" if self.reverse else "")
        shown = f", only *{self.pattern}*" if self.pattern else ""
        return Text(
            f"by {order}{shown}   sort: n a u o k   / filter   q quit",
            style="reverse",
            no_wrap=True,
        )


@click.command(
    help="""Show what is registered and what happens, live, in the terminal.

    Keys: n name, a age, u uses, o owner, k kind sort, again reverses; / filters; q quits.

    \b
    Example:
      fdshare top --interval 0.5
    """,
)
@click.option(
    "--interval", type=click.FloatRange(0.1), default=1.0, show_default=True, metavar="SECONDS"
)
@for_server
def top(client: Client, interval: float) -> None:
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise click.UsageError("top needs a terminal; fdshare ls and fdshare watch do not")
    from rich.console import Console
    from rich.live import Live

    console = Console(highlight=False)
    if console.is_dumb_terminal:  # rich would draw nothing
        raise click.UsageError(
            "top needs a terminal that can move its cursor, and TERM says that this one cannot; "
            "fdshare ls and fdshare watch do not"
        )
    client.ping()
    view = View()
    _follow_events(client, view)
    with _keyboard() as keys, Live(console=console, screen=True, auto_refresh=False) as live:
        while not view.quit:
            _ask(client, view)
            due = time.monotonic() + interval
            while not view.quit and (left := due - time.monotonic()) > 0:
                live.update(view.draw(console.width, console.height), refresh=True)
                for pressed in keys(left):
                    view.press(pressed)


def _ask(client: Client, view: View) -> None:
    try:
        view.sample(client.infos(), client.stats(), time.monotonic())
    except FdshareError as error:
        view.error = error.message


def _follow_events(client: Client, view: View) -> None:
    """Adds each change to the view, from a thread."""

    def follow() -> None:
        try:
            with client.watch() as changes:
                for change in changes:
                    if line := _event_line(change):
                        view.events.append(line)
        except (FdshareError, OSError):
            pass  # the view shows the error

    threading.Thread(target=follow, daemon=True).start()


def _event_line(change: WatchItem) -> str:
    if change.event == "snapshot":
        return ""
    old = f" (was {printable(change.old)})" if change.old else ""
    clock = time.strftime("%H:%M:%S")
    return f"{clock} {change.event.replace('_', ' ')} {printable(change.name)}{old}"


@contextmanager
def _keyboard() -> Iterator[Callable[[float], str]]:
    """A function that waits some seconds for keys. Restores the terminal afterwards."""
    import termios
    import tty

    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)

    def keys(timeout: float) -> str:
        ready, _, _ = select.select([fd], [], [], timeout)
        if not ready:
            return ""
        # An arrow key arrives as ESC [ A at once: it is not the escape key.
        data = os.read(fd, 64).decode(errors="replace")
        if len(data) > 1 and data.startswith(_ESCAPE):
            return ""
        return data or _INTERRUPT[1]  # no data: the terminal is closed

    tty.setcbreak(fd)
    try:
        yield keys
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)
