"""stats, ping, explain, reload, upgrade, stop: the state of the server, and commands to it."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem

from fdshare.cli.format import age, print_facts, print_json
from fdshare.cli.options import complete_user, for_server, json_option, name_argument, uid_of
from fdshare.printable import printable

if TYPE_CHECKING:
    from fdshare.client.blocking.client import Client
    from fdshare.protocol.messages import StoreStats

__all__ = ["explain", "ping", "reload", "stats", "stop", "upgrade"]


@click.command(
    short_help="Show the state of the server.",
    help="""Show the state of the server: processes, counts, limits.

    \b
    Example:
      fdshare stats --json | jq .redundant
    """,
)
@json_option
@click.option("--prometheus", is_flag=True, help="Print Prometheus text.")
@for_server
def stats(client: Client, as_json: bool, prometheus: bool) -> None:
    found = client.stats()
    if as_json:
        print_json(found)
        return
    if prometheus:
        from fdshare.server.metrics import render

        print(render(found), end="")
        return
    keeper = "none" if found.keeper_pid is None else str(found.keeper_pid)
    redundant = "yes, either half may die now" if found.redundant else "no"
    lines = {
        "server": f"pid {found.server_pid}, up {age(found.uptime)}",
        "keeper": keeper,
        "redundant": redundant,
        "names": f"{found.names} of {found.limits['max_names']:.0f}",
        "descriptors": f"{found.descriptors} of {found.limits['max_descriptors']:.0f}",
        "connections": f"{found.connections} of {found.limits['max_connections']:.0f}",
        "in flight": f"{found.in_flight} of {found.limits['in_flight']:.0f}",
        "leases": str(found.leases),
        "generation": str(found.generation),
        **({} if found.store is None else {"store": _store(found.store)}),
        **{name: f"{value:,}" for name, value in found.counters.items()},
        **({"log dropped": f"{found.log_dropped:,} lines"} if found.log_dropped else {}),
        **found.notes,
    }
    print_facts(lines.items())


def _store(store: StoreStats) -> str:
    limit = "an unknown limit" if store.limit is None else str(store.limit)
    missing = f", {store.missing} names are not in it" if store.missing else ""
    return f"{store.descriptors} descriptors of {limit}{missing}"


@click.command(
    short_help="Check that the server answers.",
    help="""Check that the server answers; status 69 if there is none.

    \b
    Example:
      fdshare ping && fdshare ls
    """,
)
@for_server
def ping(client: Client) -> None:
    start = time.perf_counter()
    client.ping()
    milliseconds = (time.perf_counter() - start) * 1e3
    print(f"{client.address} answered in {milliseconds:.1f} ms")


def _complete_verb(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    from fdshare.server.core.policy import VERBS

    return [CompletionItem(verb) for verb in VERBS if verb.startswith(incomplete)]


@click.command(
    short_help="Show what the policy allows a user, and by which rule.",
    help="""Show whether the policy allows VERB to a user, and the rule that decides. Status 1 if
    not.

    VERB is one of register, fetch, take, unregister, bind, list, info, watch, stats, ping, explain,
    reload, upgrade, shutdown.

    \b
    Example:
      fdshare explain fetch web --uid www-data
    """,
)
@click.argument("verb", shell_complete=_complete_verb)
@name_argument(default="")
@click.option(
    "--uid",
    "--user",
    "user",
    metavar="USER",
    shell_complete=complete_user,
    help="The user. [default: yourself]",
)
@click.option("--gid", type=int, help="The group. [default: the user's own]")
@json_option
@for_server
def explain(
    client: Client, verb: str, name: str, user: str | None, gid: int | None, as_json: bool
) -> int:
    uid = os.geteuid() if user is None else uid_of(user)
    main, groups = _groups_of(uid)
    found = client.explain(verb, name, uid, main if gid is None else gid, groups)
    if as_json:
        print_json(found)
    else:
        may = "may" if found.allowed else "may not"
        target = f" {name!r}" if name else ""
        print(printable(f"uid {uid} {may} {verb}{target}: {found.rule}"))
    return 0 if found.allowed else 1


def _groups_of(uid: int) -> tuple[int, list[int]]:
    """(main group, supplementary groups) of a user; (the uid, none) if it has no name."""
    import pwd

    if uid == os.geteuid():
        return os.getegid(), os.getgroups()
    try:
        entry = pwd.getpwuid(uid)
    except KeyError:
        return uid, []
    return entry.pw_gid, os.getgrouplist(entry.pw_name, entry.pw_gid)


@click.command(
    short_help="Make the server read its policy file again.",
    help="""Make the server read its policy file again. If the new one is wrong, the old one stays.

    Users and groups that the file names and nobody knows are told.

    \b
    Example:
      $EDITOR /etc/fdshare.toml && fdshare reload
    """,
)
@for_server
def reload(client: Client) -> None:
    client.reload()
    try:
        warning = client.stats().notes.get("policy")
    except PermissionError:  # who may reload may not see that
        return
    if warning is not None:
        print(f"fdshare: {printable(warning)}", file=sys.stderr)


@click.command(
    short_help="Make the server run the code that is installed now.",
    help="""Make the server run the code that is installed now, with all that it holds.

    The new code is tried first. If it fails, the old code goes on, and this command says why.

    \b
    Example:
      pip install --upgrade fdshare && fdshare upgrade
    """,
)
@for_server
def upgrade(client: Client) -> None:
    client.upgrade()


@click.command(
    help="""End the server, which closes all that it holds.

    What a service manager holds for it (serve --fdstore) stays there, for the next start.

    \b
    Example:
      fdshare stop
    """,
)
@for_server
def stop(client: Client) -> None:
    try:
        store = client.stats().store
    except PermissionError:
        store = None
    client.shutdown()
    if store is not None:
        print(
            "fdshare: its service manager holds everything still, and may start it again; "
            "systemctl stop ends both",
            file=sys.stderr,
        )
