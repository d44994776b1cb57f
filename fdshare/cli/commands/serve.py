"""serve: runs a server in the foreground."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from fdshare.cli.options import authkey_from_environment, uid_of
from fdshare.cli.support.background import go_on_in_background
from fdshare.errors import AddressInUse
from fdshare.kernel.unix_address import is_abstract
from fdshare.printable import printable

if TYPE_CHECKING:
    from fdshare.kernel.endpoint import Listener
    from fdshare.server.settings import Settings

__all__ = ["serve"]


def _mode(context: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    if value is None:
        return None
    if len(value) > 4 or not value.isascii() or not value.strip("01234567") == "":
        raise click.BadParameter(f"{value!r} is not a mode; write 0660")
    return int(value, 8)


def _limits(
    context: click.Context, parameter: click.Parameter, values: tuple[str, ...]
) -> dict[str, float]:
    from fdshare.server.limits import Limits

    limits: dict[str, float] = {}
    for text in values:
        name, _, number = text.partition("=")
        if name not in Limits.__struct_fields__:
            known = ", ".join(Limits.__struct_fields__)
            raise click.BadParameter(f"there is no limit {name!r}; the limits are {known}")
        try:
            limits[name] = float(number) if "timeout" in name else int(number)
        except ValueError:
            raise click.BadParameter(f"{number!r} is not a number") from None
    return limits


def _metrics(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    if value is not None:
        from fdshare.server.metrics import parse_host_port

        try:
            parse_host_port(value)
        except ValueError as error:
            raise click.BadParameter(str(error)) from None
    return value


@click.command(
    short_help="Run a server in the foreground.",
    help="""Run a server in the foreground, at PATH, until SIGTERM, SIGINT or `fdshare stop`.

    With --detach it runs in the background, and its log is PATH.log: this command prints the path
    and the pid when clients can connect.

    SIGHUP reads the policy again, and binds PATH again if somebody has removed it; SIGUSR2 upgrades
    to the code that is installed now. Under a service manager it takes its socket from LISTEN_FDS,
    and reports to NOTIFY_SOCKET; with --detach it is no part of the service.

    \b
    Examples:
      fdshare serve --detach
      fdshare serve --mode 0660 --group www-data --policy /etc/fdshare.toml
    """,
)
@click.argument("address", metavar="[PATH]", required=False)
@click.option("--path", metavar="PATH", help="The same as PATH.")
@click.option(
    "--policy", type=click.Path(), metavar="FILE", help="The policy: who may do what (TOML)."
)
@click.option("--mode", callback=_mode, metavar="MODE", help="Of the socket. [default: 0600]")
@click.option("--owner", metavar="USER", help="Of the socket.")
@click.option("--group", metavar="GROUP", help="Of the socket.")
@click.option("--backlog", type=click.IntRange(1), default=4096, show_default=True)
@click.option(
    "--limit",
    "limits",
    multiple=True,
    callback=_limits,
    metavar="NAME=NUMBER",
    help="Such as max_names=1000; `fdshare stats` lists them.",
)
@click.option(
    "--detach", is_flag=True, help="Go on in the background; return when it serves, or why not."
)
@click.option("--ready-fd", type=int, metavar="N", help="Write a newline here when ready.")
@click.option(
    "--keeper/--no-keeper", default=True, help="Run a second process, to survive kill -9."
)
@click.option("--fdstore", is_flag=True, help="Keep the table in the service manager, too.")
@click.option(
    "--metrics", callback=_metrics, metavar="HOST:PORT", help="Serve Prometheus text over HTTP."
)
@click.option(
    "--log-format", type=click.Choice(["text", "json"]), default="text", show_default=True
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    show_default=True,
)
@click.option("--audit-strict", is_flag=True, help="Refuse requests that the log has no room for.")
@click.option(
    "--authkey-file", type=click.Path(), metavar="FILE", help="A key that clients need, too."
)
def serve(address: str | None, path: str | None, **options: Any) -> int:
    from fdshare.cli.support.passed import Passed
    from fdshare.server.logs import configure
    from fdshare.server.serve import serve as serve_settings

    if "" in (address, path):
        raise click.UsageError("PATH is empty")
    _clean_signals()
    ready_fd = _checked_ready_fd(options["ready_fd"])
    if options["detach"]:
        address = _detached_path(address or path, ready_fd)
        ready_fd = go_on_in_background(address)
    passed = Passed()
    settings, listener = _prepare(address or path, options, passed.listener)
    if options["detach"]:
        os.chdir("/")  # no file system is kept busy
    configure(settings)
    try:
        fdstore, table = passed.restore(options, settings)
        ready = _ready(ready_fd, settings, options["detach"])
        serve_settings(settings, ready, listener, fdstore=fdstore, table=table)
    except BaseException:
        listener.close()  # a policy that is wrong must leave no socket behind
        raise
    return 0


def _detached_path(path: str | None, ready_fd: int | None) -> str:
    """The path of a server that is to go on in the background. Raises: click.UsageError."""
    from fdshare.client.default_path import default_path, make_own_folder
    from fdshare.kernel.unix_address import absolute

    if ready_fd is not None:
        raise click.UsageError("--detach returns when the server is ready; leave --ready-fd out")
    if "LISTEN_FDS" in os.environ:
        raise click.UsageError("a service manager starts the server: leave --detach out")
    path = absolute(path or default_path(create=True))
    make_own_folder(path)
    return path


def _prepare(
    path: str | None, options: dict[str, Any], listener: Listener | None
) -> tuple[Settings, Listener]:
    """The settings of the server, and its listener."""
    from fdshare.client.default_path import default_path, make_own_folder
    from fdshare.server.settings import Settings

    mode = 0o600 if options["mode"] is None else options["mode"]
    served = listener.address if listener else path or default_path(create=True)
    settings = Settings(
        path=served,
        mode=mode,
        backlog=options["backlog"],
        keeper=options["keeper"],
        limits=options["limits"],
        authkey=_authkey(options["authkey_file"]),
        policy=options["policy"] and os.path.abspath(options["policy"]),
        log_format=options["log_format"],
        log_level=options["log_level"].upper(),
        audit_strict=options["audit_strict"],
        metrics=options["metrics"],
    )
    if listener is None:
        make_own_folder(settings.path)
        listener = _listen(settings, options["owner"], options["group"])
    else:
        _warn_of_void_options(listener, path)
    settings.path = listener.address
    return settings, listener


def _warn_of_void_options(listener: Listener, path: str | None) -> None:
    """Of those that are for a socket which this process makes."""
    context = click.get_current_context()
    given = [
        f"--{name}"
        for name in ("mode", "owner", "group", "backlog")
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE
    ]
    if path is not None and os.path.abspath(path) != listener.address and path != listener.address:
        given.insert(0, path)
    if given:
        _warn(f"{', '.join(given)}: not for {listener.address}, which was passed by LISTEN_FDS")


def _listen(settings: Settings, owner: str | None, group: str | None) -> Listener:
    """A new listener, whose file belongs to *owner* and *group*."""
    from fdshare.kernel.endpoint import listen

    uid = -1 if owner is None else uid_of(owner)
    gid = -1 if group is None else _gid_of(group)
    settings.owner = None if (uid, gid) == (-1, -1) else (uid, gid)
    try:
        return listen(
            settings.path, mode=settings.mode, backlog=settings.backlog, owner=settings.owner
        )
    except AddressInUse as error:
        raise _of_lost_path(error) from None


def _of_lost_path(error: AddressInUse) -> AddressInUse:
    """*error*, with what to do where the server lives and somebody has removed its socket."""
    if error.pid is None or is_abstract(error.address) or os.path.lexists(error.address):
        return error
    pid = error.pid
    reason = f"a live server, pid {pid}, whose socket was removed; kill -HUP {pid} binds it again"
    return AddressInUse(error.address, reason, pid)


def _gid_of(group: str) -> int:
    if group.isascii() and group.isdigit():
        return int(group)
    import grp

    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise click.BadParameter(f"there is no group {group!r}") from None


def _authkey(file: str | None) -> bytes | None:
    if file is not None:
        os.environ["FDSHARE_AUTHKEY_FILE"] = file
    return authkey_from_environment()


def _checked_ready_fd(number: int | None) -> int | None:
    """*number*, no longer inherited by children."""
    if number is not None:
        try:
            os.set_inheritable(number, False)
        except OSError:
            raise click.BadParameter(f"descriptor {number} is not open", param_hint="--ready-fd")
    return number


def _ready(number: int | None, settings: Settings, detached: bool) -> Callable[[], None]:
    """The function to call when clients can connect."""
    line = b"%d\n" % os.getpid() if detached else b"\n"

    def ready() -> None:
        from fdshare.server.failover.service_manager import report

        report(f"READY=1\nMAINPID={os.getpid()}\nSTATUS=Serving at {settings.path}")
        logging.getLogger("fdshare.server").info("serving at %s", settings.path)
        if number is not None:
            try:
                os.write(number, line)
            except OSError as error:
                _warn(f"cannot write to --ready-fd: {error}")
            os.close(number)

    return ready


def _clean_signals() -> None:
    """Unblocks the signals that end a server: a parent may have blocked them."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGHUP})


def _warn(message: str) -> None:
    print(f"fdshare: {printable(message)}", file=sys.stderr)
