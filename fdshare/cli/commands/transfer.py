"""dump, load, transfer: many entries at once, from one server to another, all or nothing.

A dump is metadata: descriptors cannot be written to a file. `load` fetches the descriptors from the
server that the dump names, and checks that they are still the ones that were dumped.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from typing import IO, TYPE_CHECKING, Any, Final

import click
import msgspec

from fdshare.cli.options import client_at, for_server, json_option
from fdshare.errors import FdshareError, GenerationMismatch, InvalidArgument
from fdshare.kernel.ancillary import close_all
from fdshare.kernel.descriptor import Descriptor
from fdshare.printable import printable, printable_json
from fdshare.protocol import messages as m
from fdshare.protocol.kind import Kind

if TYPE_CHECKING:
    from fdshare.client.blocking.client import Client
    from fdshare.client.verbs import Steps

__all__ = ["dump", "load", "move_over", "transfer"]

_FORMAT: Final = "fdshare-dump-1"


class Dump(msgspec.Struct):
    """The content of a dump's file."""

    format: str
    server: str
    entries: list[m.EntryInfo]


class Copy(msgspec.Struct):
    """An entry to register at the other server, with copies of its descriptors."""

    info: m.EntryInfo
    kind: Kind
    descriptors: list[Descriptor]


@click.command(
    short_help="Write what is registered to a file, as JSON.",
    help="""Write what is registered to FILE, as JSON: names, kinds, lifetimes, metadata, and what
    each descriptor is. The descriptors themselves stay in the server; see load.

    \b
    Example:
      fdshare dump held.json
    """,
)
@click.argument("file", type=click.Path(), default="-")
@click.option("--pattern", default="*", show_default=True, help="Which names.")
@for_server
def dump(client: Client, file: str, pattern: str) -> None:
    from fdshare.cli.format import json_for_output, plain
    from fdshare.cli.support.text_file import write_text

    made = Dump(_FORMAT, _absolute(client.address), client.infos(pattern))
    lines = msgspec.json.format(msgspec.json.encode(plain(made)), indent=2).decode().split("\n")
    if file == "-":
        for line in lines:
            print(json_for_output(line))
    else:  # only now: a server that does not answer costs nobody the last dump
        write_text(file, "".join(f"{printable_json(line)}\n" for line in lines))


@click.command(
    short_help="Register what a dump of another server lists.",
    help="""Register what FILE, a dump of another server, lists; all of it or nothing.

    The descriptors come from the server that was dumped, which keeps them too.

    \b
    Example:
      fdshare load held.json --path /run/new.sock
    """,
)
@click.argument("file", type=click.File("rb"))
@click.option(
    "--from", "source", metavar="PATH", help="Fetch from this server, not from the dumped one."
)
@click.option("--replace", is_flag=True, help="Replace what is registered here.")
@json_option
@for_server
def load(client: Client, file: IO[bytes], source: str | None, replace: bool, as_json: bool) -> None:
    try:
        wanted = msgspec.json.decode(file.read(), type=Dump)
    except msgspec.MsgspecError as error:
        raise InvalidArgument(file.name, f"it is not a dump: {error}") from None
    if wanted.format != _FORMAT:
        raise InvalidArgument(file.name, f"its format is {wanted.format}, this reads {_FORMAT}")
    trust: tuple[str, ...] = click.get_current_context().params["trust"]  # for both servers
    with client_at(source or wanted.server, trust) as origin:
        _report(_transfer(origin, client, wanted.entries, replace), as_json)


@click.command(
    short_help="Copy or move entries to another server.",
    help="""Register at the server TO what the server FROM has; all of it or nothing.

    \b
    Example:
      fdshare transfer /run/old.sock /run/new.sock --pattern 'web/*'
    """,
)
@click.argument("source", metavar="FROM")
@click.argument("target", metavar="TO")
@click.option("--pattern", default="*", show_default=True, help="Which names.")
@click.option("--replace", is_flag=True, help="Replace what is registered at TO.")
@click.option("--move", is_flag=True, help="Remove them from FROM afterwards.")
@click.option("--trust", metavar="USER", multiple=True, help="Trust a server of this user, too.")
@json_option
def transfer(
    source: str,
    target: str,
    pattern: str,
    replace: bool,
    move: bool,
    trust: Sequence[str],
    as_json: bool,
) -> None:
    with client_at(source, trust) as origin, client_at(target, trust) as client:
        entries = origin.infos(pattern)
        made = _transfer(origin, client, entries, replace)
        if move:
            for entry in entries:
                origin.unregister(entry.name, if_generation=entry.generation)
        _report(made, as_json)


def _absolute(address: str) -> str:
    from fdshare.kernel.unix_address import absolute

    return absolute(address)


def _report(made: list[m.Registered], as_json: bool) -> None:
    if as_json:
        from fdshare.cli.format import print_json

        print_json([{"name": entry.name, "generation": entry.generation} for entry in made])
        return
    for entry in made:
        print(printable(entry.name))


# All or nothing.


def _transfer(
    origin: Client, client: Client, entries: Sequence[m.EntryInfo], replace: bool
) -> list[m.Registered]:
    """Registers with *client* what *origin* has; undoes all of it if one entry fails."""
    from fdshare.kernel.descriptor_limit import raise_descriptor_limit

    raise_descriptor_limit()
    _refuse_bound(entries)
    with ExitStack() as stack:
        copies = [_fetch_checked(origin, entry, stack) for entry in entries]
        former = _former(client, entries, stack) if replace else {}
        made: list[m.Registered] = []
        try:
            for copy in copies:
                entry = _register(client, copy, replace)
                made.append(entry)
        except BaseException as error:
            _undo(client, made, former, error)
            raise
        return made


def _fetch_checked(origin: Client, entry: m.EntryInfo, stack: ExitStack) -> Copy:
    """A copy of *entry*, if it is still the one that was listed; *stack* closes it."""
    given, descriptors = origin._do(_fetch(entry.name))
    stack.callback(close_all, descriptors)
    if given.generation != entry.generation:
        raise GenerationMismatch(entry.name, entry.generation, given.generation)
    return Copy(entry, given.kind, descriptors)


def _former(client: Client, entries: Sequence[m.EntryInfo], stack: ExitStack) -> dict[str, Copy]:
    """Copies of what *client* has now under the names of *entries*."""
    names = {entry.name for entry in entries}
    held = [info for info in client.infos() if info.name in names]
    _refuse_bound(held)
    return {info.name: _fetch_checked(client, info, stack) for info in held}


def _refuse_bound(entries: Sequence[m.EntryInfo]) -> None:
    """Refuses entries that live as long as a process or connection: a copy cannot have that."""
    bound = [entry.name for entry in entries if entry.lifetime != "server"]
    if bound:
        raise InvalidArgument(
            "lifetime", f"{', '.join(bound)}: bound to a process or a connection; leave it out"
        )


def move_over(client: Client, old: str, new: str) -> None:
    """*new* is what was *old*, in place of what *new* was; it is there all the time.

    Raises: InvalidArgument: *old* is bound to a process or a connection; NameNotFound;
    GenerationMismatch: somebody replaced *old* meanwhile, and *new* is what it was.
    """
    info = client.info(old)
    _refuse_bound([info])
    with ExitStack() as stack:
        copy = _fetch_checked(client, info, stack)
        copy.info = msgspec.structs.replace(info, name=new)
        _register(client, copy, replace=True)
    client.unregister(old, if_generation=info.generation)


def _undo(
    client: Client, made: Sequence[m.Registered], former: dict[str, Copy], error: BaseException
) -> None:
    for entry in reversed(made):
        try:
            if entry.name in former:
                _register(client, former[entry.name], replace=True)
            else:
                client.unregister(entry.name, if_generation=entry.generation)
        except FdshareError as failure:
            text = printable(f"cannot undo {entry.name} after {error}: {failure}")
            print(f"fdshare: {text}", file=sys.stderr)


def _register(client: Client, copy: Copy, replace: bool) -> m.Registered:
    made: m.Registered = client._do(_put(copy, replace))
    return made


# Exchanges of its own, since the verbs of a client would rebuild the objects: kinds that this
# process does not know must pass, and the offset of a file must not move.


def _fetch(name: str) -> Steps[tuple[Any, list[Descriptor]]]:
    from fdshare.client.conversation import Exchange

    parts = yield Exchange(m.Fetch(name))
    return parts.replies[0], parts.descriptors


def _put(copy: Copy, replace: bool) -> Steps[m.Registered]:
    from fdshare.client.conversation import Exchange

    info = copy.info
    request = m.Register(
        name=info.name,
        kind=copy.kind,
        replace=replace,
        ttl=info.ttl,
        grace=info.grace,
        drop_on_hangup=info.drop_on_hangup,
        metadata=info.metadata,
    )
    parts = yield Exchange(request, [d.fileno() for d in copy.descriptors])
    made: m.Registered = parts.replies[0]
    return made
