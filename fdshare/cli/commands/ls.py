"""ls and info: what is registered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import click

from fdshare.cli.format import (
    Column,
    age,
    descriptor_text,
    entry_text,
    print_facts,
    print_json,
    print_table,
    user,
)
from fdshare.cli.options import for_server, json_option, name_argument
from fdshare.printable import printable

if TYPE_CHECKING:
    from fdshare.client.blocking.client import Client
    from fdshare.protocol.messages import EntryInfo

__all__ = ["COLUMNS", "info", "ls", "row"]

COLUMNS: Final = (
    Column("NAME", give=1, colour="cyan"),
    Column("KIND"),
    Column("WHAT", give=1),
    Column("OWNER", colour="yellow"),
    Column("AGE", right=True),
    Column("USES", right=True),
    Column("TTL", right=True),
)


def row(entry: EntryInfo) -> list[str]:
    """The cells of one entry, for COLUMNS."""
    return [
        entry.name,
        entry.kind,
        "(taken, not yet confirmed)" if entry.leased else _what(entry),
        user(entry.registrant.uid),
        age(entry.age),
        str(entry.fetches),
        "-" if entry.ttl is None else age(entry.ttl),
    ]


def _what(entry: EntryInfo) -> str:
    text = entry_text(entry)
    return f"{text} (not stored)" if entry.stored is False else text


@click.command(
    help="""List what is registered, as the kernel sees it now.

    PATTERN is a shell pattern for names; * matches / too.

    \b
    Example:
      fdshare ls 'web/*'
    """,
)
@click.argument("pattern", default="*")
@click.option("-q", "--quiet", is_flag=True, help="Print the names alone, one a line.")
@json_option
@for_server
def ls(client: Client, pattern: str, quiet: bool, as_json: bool) -> None:
    if quiet:
        for name in client.names(pattern):
            print(printable(name))
        return
    entries = client.infos(pattern)
    if as_json:
        print_json(entries)
    else:
        print_table(COLUMNS, [row(entry) for entry in entries])


@click.command(
    help="""Show all that the server and the kernel know of NAMES. JSON is one line for each.

    \b
    Example:
      fdshare info web
    """,
)
@name_argument("names", nargs=-1, required=True)
@json_option
@for_server
def info(client: Client, names: Sequence[str], as_json: bool) -> None:
    for number, entry in enumerate([client.info(name) for name in names]):
        if as_json:
            print_json(entry)
            continue
        if number:
            print()
        print_facts(_facts(entry))


def _facts(entry: EntryInfo) -> list[tuple[str, str]]:
    who = entry.registrant
    command = f": {who.command}" if who.command else ""
    facts = [
        ("name", entry.name),
        ("kind", f"{entry.kind}, generation {entry.generation}"),
        ("registered", f"{age(entry.age)} ago by {user(who.uid)} (pid {who.pid}{command})"),
        ("lifetime", _lifetime(entry)),
        ("fetched", "once" if entry.fetches == 1 else f"{entry.fetches} times"),
    ]
    if entry.leased:
        facts.append(("leased", "taken, and not yet confirmed"))
    if entry.stored is not None:
        facts.append(("stored", "yes" if entry.stored else "no, it is lost with both halves"))
    facts += [("metadata", f"{key}={value}") for key, value in sorted(entry.metadata.items())]
    for number, descriptor in enumerate(entry.descriptors):
        facts.append((f"descriptor {number}", descriptor_text(descriptor)))
        more = [f"access {descriptor.access}"] if descriptor.access else []
        if descriptor.size is not None:
            more.append(f"{descriptor.size:,} bytes")
        if descriptor.seals:
            more.append("seals " + ", ".join(descriptor.seals))
        if more:
            facts.append(("", "; ".join(more)))
    return facts


def _lifetime(entry: EntryInfo) -> str:
    words = {
        "server": "as long as the server",
        "connection": "as long as its client is connected",
        "process": "as long as the process that registered it",
    }[entry.lifetime]
    if entry.grace:
        words += f", and {entry.grace:g} s more"
    if entry.ttl is not None:
        words += f"; {entry.ttl:.0f} s left"
    if entry.drop_on_hangup:
        words += "; until its peer hangs up"
    return words
