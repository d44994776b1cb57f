"""who: lists the processes that have the same open file description now."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final

import click

from fdshare.cli.format import Column, print_json, print_table, user
from fdshare.cli.options import for_server, json_option, name_argument
from fdshare.errors import AccessDenied
from fdshare.kernel import system

if TYPE_CHECKING:
    from fdshare.cli.support.open_files import Holder
    from fdshare.client.blocking.client import Client

__all__ = ["who"]

_COLUMNS: Final = (
    Column("PID", right=True, colour="cyan"),
    Column("USER", colour="yellow"),
    Column("FDS"),
    Column("HOW"),
    Column("COMMAND", give=1),
)


@click.command(
    short_help="List the processes that have it open now.",
    help="""List the processes that have open what is registered under NAME, now.

    HOW is kcmp if the kernel says that it is the same open file description, and inode if only the
    file or socket is known to be the same. The server and its keeper are among them. A user sees
    his own processes, root sees all.

    \b
    Example:
      fdshare who web
    """,
)
@name_argument()
@json_option
@for_server
def who(client: Client, name: str, as_json: bool) -> None:
    if not system.LINUX:
        from fdshare.errors import UnsupportedPlatform

        raise UnsupportedPlatform("fdshare who", f"{system.NAME} has no /proc/PID/fd")
    from fdshare.cli.support.open_files import holders
    from fdshare.client import verbs

    halves = _halves(client)
    with ExitStack() as stack:
        descriptors = [stack.enter_context(d) for d in client._do(verbs.look_raw(name))]
        found = holders([d.fileno() for d in descriptors])
    if os.geteuid() == 0 and halves and not any(holder.pid in halves for holder in found):
        where = "/proc is not mounted, or is that of another pid namespace"
        print(f"fdshare: no process of the server is seen here: {where}", file=sys.stderr)
    if as_json:
        print_json([{**holder._asdict(), "half": halves.get(holder.pid)} for holder in found])
        return
    print_table(_COLUMNS, [_row(holder, halves) for holder in found])


def _halves(client: Client) -> dict[Any, str]:
    """pid -> which half of the server it is; none where this user may not know."""
    try:
        stats = client.stats()
    except AccessDenied:
        return {}
    return {stats.server_pid: "server", stats.keeper_pid: "keeper"}


def _row(holder: Holder, halves: dict[Any, str]) -> list[str]:
    half = halves.get(holder.pid)
    command = f"fdshare {half}: {holder.command}" if half else holder.command
    numbers = ",".join(map(str, holder.fds[:3])) + (",..." if len(holder.fds) > 3 else "")
    return [str(holder.pid), user(holder.uid), numbers, holder.how, command]
