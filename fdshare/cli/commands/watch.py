"""wait and watch: wait for names, print changes."""

from __future__ import annotations

import os
import select
import stat
import sys
import threading
from typing import TYPE_CHECKING

import click

from fdshare.cli.format import print_json
from fdshare.cli.options import Seconds, for_server, json_option, name_argument, or_never
from fdshare.errors import FetchTimeout
from fdshare.printable import printable

if TYPE_CHECKING:
    from fdshare.client.blocking.client import Client
    from fdshare.client.watch_state import WatchItem

__all__ = ["wait", "watch"]


@click.command(
    short_help="Return when names are registered.",
    help="""Return when all of NAMES are registered; status 1 if that takes too long.

    \b
    Example:
      fdshare wait web --timeout 30 && ./smoke-test
    """,
)
@name_argument("names", nargs=-1, required=True)
@click.option(
    "--timeout", type=Seconds(), metavar="SECONDS", help="Wait at most so long. [default: for ever]"
)
@for_server
def wait(client: Client, names: tuple[str, ...], timeout: float | None) -> None:
    import time

    deadline = None if timeout is None else time.monotonic() + timeout
    for name in names:
        left = None if deadline is None else max(deadline - time.monotonic(), 0.001)
        try:
            client.wait(name, timeout=None if left is None else or_never(left))
        except FetchTimeout:  # which knows what was left for this name
            raise FetchTimeout(name, timeout or 0.0) from None


@click.command(
    short_help="Print each change as it happens.",
    help="""Print what is registered, and then each change as it happens, until interrupted.

    \b
    Example:
      fdshare watch 'web/*' --json
    """,
)
@click.argument("pattern", default="*")
@json_option
@for_server
def watch(client: Client, pattern: str, as_json: bool) -> None:
    _leave_with_reader()
    with client.watch(pattern) as changes:
        for change in changes:
            if as_json:
                print_json(_as_data(change))
            else:
                print(printable(_in_words(change)), flush=True)


def _leave_with_reader() -> None:
    """Ends this process when nobody reads its output any more, even if nothing happens.

    tail(1) does the same in `tail -f FILE | head -1`.
    """
    output = sys.stdout.fileno()
    if not stat.S_ISFIFO(os.fstat(output).st_mode):
        return

    def look() -> None:
        waiting = select.poll()
        waiting.register(output, 0)  # POLLERR needs no request: no reader is left
        waiting.poll()
        os._exit(1)

    threading.Thread(target=look, daemon=True).start()


def _as_data(change: WatchItem) -> dict[str, object]:
    from fdshare.cli.format import plain

    data = {"event": change.event, **plain(change)}
    data.pop("type", None)
    return data


def _in_words(change: WatchItem) -> str:
    from fdshare.client.watch_state import Snapshot

    if isinstance(change, Snapshot):
        names = ", ".join(sorted(change.entries)) or "nothing"
        why = "" if change.reason == "start" else f" (after {change.reason})"
        return f"{change.serial:>6}  held{why}: {names}"
    renamed = f", before {change.old}" if change.old else ""
    event = change.event.replace("_", " ")
    return (
        f"{change.serial:>6}  {event:<12} {change.name} (generation {change.generation}{renamed})"
    )
