"""ls and info: what is registered."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

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

__all__ = ["COLUMNS", "formatted", "info", "ls", "row"]

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


def formatted(template: str, entry: EntryInfo) -> str:
    """*template* with the facts of *entry*. Raises: click.BadParameter: it has no such field."""
    from fdshare.protocol.messages import DescriptorInfo

    first = entry.descriptors[0] if entry.descriptors else DescriptorInfo("unknown")
    name, kind, what, owner, since, uses, ttl = row(entry)
    facts: dict[str, Any] = {
        "name": name,
        "kind": kind,
        "generation": entry.generation,
        "what": what,
        "local": first.local,
        "peer": first.peer,
        "path": first.path,
        "health": first.health,
        "owner": owner,
        "uid": entry.registrant.uid,
        "pid": entry.registrant.pid,
        "command": entry.registrant.command,
        "age": since,
        "uses": uses,
        "ttl": ttl,
        "lifetime": entry.lifetime,
    }
    facts = {key: printable(str(value)) for key, value in facts.items()}
    metadata = {key: printable(value) for key, value in entry.metadata.items()}
    facts["metadata"] = defaultdict(str, metadata)
    try:
        return template.format_map(facts)
    except KeyError as error:
        known = ", ".join([*facts][:-1])
        raise _bad_format(f"there is no field {error}; the fields are {known}, metadata[KEY]")
    except (ValueError, IndexError, AttributeError, TypeError) as error:
        raise _bad_format(str(error)) from None


def _bad_format(why: str) -> click.BadParameter:
    return click.BadParameter(why, param_hint="--format")


def _what(entry: EntryInfo) -> str:
    text = entry_text(entry)
    return f"{text} (not stored)" if entry.stored is False else text


@click.command(
    help="""List what is registered, as the kernel sees it now.

    PATTERN is a shell pattern for names; * matches / too.

    A --format has fields in braces, as Python's format strings: name, kind, generation, what,
    local, peer, path, health, owner, uid, pid, command, age, uses, ttl, lifetime, metadata[KEY].
    local, peer, path and health are of the first descriptor.

    \b
    Examples:
      fdshare ls 'web/*'
      fdshare ls --format '{name:20} {local} {uses}'
    """,
)
@click.argument("pattern", default="*")
@click.option("-q", "--quiet", is_flag=True, help="Print the names alone, one a line.")
@click.option("--format", "template", metavar="TEXT", help="Print this for each, one a line.")
@json_option
@for_server
def ls(client: Client, pattern: str, quiet: bool, template: str | None, as_json: bool) -> None:
    if quiet + as_json + (template is not None) > 1:
        raise click.UsageError("give one of --quiet, --format and --json")
    if quiet:
        for name in client.names(pattern):
            print(printable(name))
        return
    entries = client.infos(pattern)
    if as_json:
        print_json(entries)
    elif template is not None:
        for entry in entries:
            print(formatted(template, entry))
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
