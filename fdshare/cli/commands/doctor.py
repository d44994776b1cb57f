"""doctor: finds what prevents fdshare from working, and says what to do."""

from __future__ import annotations

import os
import platform
import resource
import stat
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

import click

from fdshare.cli.format import print_json, user
from fdshare.cli.options import client_at, json_option
from fdshare.errors import EndpointError, FdshareError, NoServer
from fdshare.kernel import system
from fdshare.kernel.path_lock import lock_owner
from fdshare.printable import printable
from fdshare.version import __version__

if TYPE_CHECKING:
    from fdshare.protocol.messages import ServerStats, StoreStats

__all__ = ["doctor"]

Health: TypeAlias = Literal["ok", "note", "bad"]

_FEW_DESCRIPTORS = 4096  # below this a server soon refuses
_SHORT_QUEUE = 1024  # connections that wait while a new version starts


class Finding(NamedTuple):
    """The result of one check. *advice* is what to do; it is empty if all is well."""

    health: Health
    subject: str
    text: str
    advice: str = ""


@click.command(
    short_help="Find problems, and say what to do about them.",
    help="""Check path, permissions, socket, server, limits and kernel; status 1 if something
    must be fixed.

    \b
    Example:
      fdshare doctor
    """,
)
@click.option("--path", metavar="PATH", help="The path of the server. [env: FDSHARE_PATH]")
@json_option
def doctor(path: str | None, as_json: bool) -> int:
    findings = list(_examine(path))
    if as_json:
        print_json([finding._asdict() for finding in findings])
    else:
        colours = {"ok": "green", "note": "yellow", "bad": "red"}
        for finding in findings:
            health = click.style(f"{finding.health:<5}", fg=colours[finding.health])
            click.echo(f"{health}{finding.subject:<13}{printable(finding.text)}")
            if finding.advice:
                click.echo(f"{'':<18}{printable(finding.advice)}")
    return int(any(finding.health == "bad" for finding in findings))


def _examine(path: str | None) -> Iterator[Finding]:
    yield _versions()
    try:
        address, why = _address(path)
    except EndpointError as error:
        yield Finding("bad", "path", error.message, "see above, or set FDSHARE_PATH")
        return
    yield Finding("ok", "path", f"{address} ({why})")
    if not address.startswith("@"):
        yield from _folder(address)
        yield from _socket(address)
    yield from _server(address)
    yield from _limits()
    yield from _kernel()


def _versions() -> Finding:
    text = f"fdshare {__version__}, Python {platform.python_version()}, {platform.platform()}"
    if not system.LINUX:
        return Finding("note", "platform", text, "every promise is tested on Linux only")
    return Finding("ok", "platform", text)


def _address(path: str | None) -> tuple[str, str]:
    """(the path of the server, why it is that path)."""
    from fdshare.client.default_path import default_path
    from fdshare.kernel.unix_address import absolute

    if path is not None:
        return absolute(path), "given"
    for variable in ("FDSHARE_PATH", "XDG_RUNTIME_DIR"):
        if os.environ.get(variable):
            return absolute(default_path()), f"by ${variable}"
    return absolute(default_path()), "the default"


def _folder(address: str) -> Iterator[Finding]:
    folder = os.path.dirname(address)
    try:
        info = os.stat(folder)
    except OSError as error:
        yield Finding("bad", "folder", f"{folder}: {error.strerror}", f"mkdir -m 700 {folder}")
        return
    text = f"{folder}, {_owner(info)}"
    if info.st_mode & stat.S_IWOTH and not info.st_mode & stat.S_ISVTX:
        yield Finding(
            "bad", "folder", text, f"anybody can put another socket there: chmod o-w {folder}"
        )
    elif not os.access(folder, os.W_OK | os.X_OK):
        yield Finding("note", "folder", text, f"you cannot start a server there as {_me()}")
    else:
        yield Finding("ok", "folder", text)


def _socket(address: str) -> Iterator[Finding]:
    try:
        info = os.lstat(address)
    except OSError:
        yield _no_socket(address)
        return
    if not stat.S_ISSOCK(info.st_mode):
        from fdshare.kernel.unix_address import file_type

        text = f"{address} is {file_type(info.st_mode)}"
        yield Finding("bad", "socket", text, "move it away, or choose another path")
    elif not os.access(address, os.W_OK):
        yield Finding(
            "bad",
            "socket",
            f"{_owner(info)}; {_me()} may not connect",
            "start the server with --mode 0660 --group GROUP, or ask as its user",
        )
    else:
        yield Finding("ok", "socket", _owner(info))


def _no_socket(address: str) -> Finding:
    owner = lock_owner(address)
    if owner is None:
        return Finding("note", "socket", "there is none", f"start one: fdshare serve {address}")
    text = f"it was removed; its server lives, pid {owner}"
    return Finding("bad", "socket", text, f"kill -HUP {owner} binds it again")


def _server(address: str) -> Iterator[Finding]:
    try:
        with client_at(address, timeout=5.0) as client:
            client.ping()
            try:
                stats = client.stats()
            except PermissionError as error:
                yield Finding("note", "server", f"it answers; {error}")
                return
    except NoServer as error:
        stale = os.path.lexists(address) and not address.startswith("@")
        if not stale and lock_owner(address) is not None:
            yield Finding("bad", "server", error.reason, "see above")
            return
        what = "stale socket: " if stale else ""
        advice = "the next `fdshare serve` takes the path" if stale else ""
        advice = f"{advice}; " if advice else ""
        yield Finding("bad", "server", f"{what}{error.reason}", f"{advice}fdshare serve {address}")
        return
    except FdshareError as error:
        yield Finding("bad", "server", error.message, "see above")
        return
    yield from _stats(stats)


def _stats(stats: ServerStats) -> Iterator[Finding]:
    text = f"pid {stats.server_pid}, {stats.names} names, {stats.connections} connections"
    yield Finding("ok", "server", text)
    if stats.keeper_pid is None:
        yield Finding("note", "keeper", "none", "kill -9 of the server loses all that it holds")
    elif not stats.redundant:
        yield Finding("note", "keeper", f"pid {stats.keeper_pid}, catching up")
    else:
        yield Finding("ok", "keeper", f"pid {stats.keeper_pid}, holds all")
    for used, limit in (
        (stats.descriptors, "max_descriptors"),
        (stats.names, "max_names"),
        (stats.connections, "max_connections"),
    ):
        if used > 0.8 * stats.limits[limit]:
            most = f"{used} of {stats.limits[limit]:.0f}"
            yield Finding("bad", limit, most, f"raise it: fdshare serve --limit {limit}=NUMBER")
    if stats.store is not None:
        yield _store(stats.store)
    for note, words in stats.notes.items():
        yield Finding("note", note, words)


def _store(store: StoreStats) -> Finding:
    of = "" if store.limit is None else f" of {store.limit}"
    text = f"{store.descriptors}{of} descriptors are with the service manager"
    if not store.missing:
        return Finding("ok", "store", text)
    return Finding(
        "bad",
        "store",
        f"{text}, {store.missing} names are not",
        "raise FileDescriptorStoreMax= in the unit: systemctl daemon-reload, then reload",
    )


def _limits() -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = f"RLIMIT_NOFILE {soft}, a server raises it to {hard}"
    if hard < _FEW_DESCRIPTORS:
        yield Finding("note", "limits", text, "raise it: ulimit -Hn, or LimitNOFILE= in the unit")
    else:
        yield Finding("ok", "limits", text)
    somaxconn = _sysctl("net/core/somaxconn")
    if somaxconn is not None:
        text = f"net.core.somaxconn {somaxconn}"
        if somaxconn < _SHORT_QUEUE:
            advice = "more connections than that cannot wait: sysctl net.core.somaxconn=4096"
            yield Finding("note", "queue", text, advice)
        else:
            yield Finding("ok", "queue", text)
    port = _sysctl("net/ipv4/ip_unprivileged_port_start")
    if port is not None:
        need = "" if os.geteuid() == 0 else ", below that a server needs CAP_NET_BIND_SERVICE"
        yield Finding("ok", "ports", f"everybody may bind from {port} on{need}")


def _kernel() -> Iterator[Finding]:
    from fdshare.activation import own_pidfd_id
    from fdshare.kernel.open_file import same_open_file

    if system.HAS_PIDFD and own_pidfd_id() is not None:
        yield Finding("ok", "pidfd", "yes, with ids")
    elif system.HAS_PIDFD:
        yield Finding("ok", "pidfd", "yes, without ids (Linux 6.9 has them)")
    else:
        yield Finding("bad", "pidfd", "none", "the keeper and lifetimes of processes need them")
    here = os.getpid()
    if same_open_file(here, 0, here, 0) is None:
        yield Finding("note", "kcmp", "not allowed", "`fdshare who` compares inodes instead")
    else:
        yield Finding("ok", "kcmp", "yes")


def _sysctl(name: str) -> int | None:
    try:
        with open(f"/proc/sys/{name}") as file:
            return int(file.read())
    except (OSError, ValueError):
        return None


def _owner(info: os.stat_result) -> str:
    import grp

    try:
        group = grp.getgrgid(info.st_gid).gr_name
    except KeyError:
        group = str(info.st_gid)
    return f"{user(info.st_uid)}:{group} {stat.S_IMODE(info.st_mode):04o}"


def _me() -> str:
    return f"uid {os.geteuid()}"
