"""Options that many commands share, and the client that they describe."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import click

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from fdshare.client.blocking.client import Client

__all__ = [
    "Seconds",
    "SignalName",
    "authkey_from_environment",
    "client_at",
    "complete_user",
    "for_server",
    "json_option",
    "name_argument",
    "or_never",
    "uid_of",
]

P = ParamSpec("P")
R = TypeVar("R")


if TYPE_CHECKING:
    _FloatType = click.ParamType[float]
    _SignalType = click.ParamType[signal.Signals]
else:  # click 8.1 has no parameter for it
    _FloatType = _SignalType = click.ParamType


class SignalName(_SignalType):
    """A signal by its name or number: TERM, SIGTERM, 15."""

    name = "signal"

    def convert(
        self, value: Any, parameter: click.Parameter | None, context: click.Context | None
    ) -> signal.Signals:
        text = str(value).upper()
        try:
            if text.isdigit():
                return signal.Signals(int(text))
            return signal.Signals[f"SIG{text.removeprefix('SIG')}"]
        except (KeyError, ValueError):
            self.fail(f"{value!r} is not a signal; write TERM", parameter, context)


class Seconds(_FloatType):
    """A number of seconds, 0 or more; `inf`, where *endless*, is without a limit."""

    name = "seconds"

    def __init__(self, *, endless: bool = True) -> None:
        self._endless = endless

    def convert(
        self, value: Any, parameter: click.Parameter | None, context: click.Context | None
    ) -> float:
        try:
            seconds = float(value)
        except ValueError:
            seconds = -1.0
        if not seconds >= 0 or (seconds == float("inf") and not self._endless):
            self.fail(f"{value!r} is not a number of seconds", parameter, context)
        return seconds


def client_at(path: str | None, trust: Iterable[str] = (), timeout: float = 30.0) -> Client:
    """A Client of the server at *path* (None: the default), not connected yet.

    *trust*: users whose server is trusted, beside this user and root. The caller owns the result.
    """
    from fdshare.client.blocking.client import Client

    trusted = {0, os.geteuid(), *map(uid_of, trust)}
    return Client(path, authkey=authkey_from_environment(), timeout=timeout, trust=trusted)


def for_server(command: Callable[..., R]) -> Callable[..., R]:
    """*command* with a Client as its first argument, closed afterwards, and the options for it."""

    @click.option("--path", metavar="PATH", help="The path of the server. [env: FDSHARE_PATH]")
    @click.option(
        "--trust", metavar="USER", multiple=True, help="Trust a server of this user, too."
    )
    @functools.wraps(command)
    def call(*args: Any, path: str | None, trust: tuple[str, ...], **options: Any) -> R:
        with client_at(path, trust) as client:
            return command(client, *args, **options)

    return call


def or_never(seconds: float) -> float | None:
    """*seconds* as the timeout of a verb, where None is never."""
    return None if seconds == float("inf") else seconds


def json_option(command: Callable[P, R]) -> Callable[P, R]:
    """*command* with the option --json, as its argument *as_json*."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)


def name_argument(name: str = "name", **options: Any) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """An argument that the shell completes from the names that are registered."""
    return click.argument(name, shell_complete=_complete_name, **options)


def uid_of(user: str) -> int:
    """The uid of a user name or number. Raises: click.BadParameter."""
    if user.isascii() and user.isdigit():
        return int(user)
    import pwd

    try:
        return pwd.getpwnam(user).pw_uid
    except KeyError:
        raise click.BadParameter(f"there is no user {user!r}") from None


def authkey_from_environment() -> bytes | None:
    """The content of the file $FDSHARE_AUTHKEY_FILE, or None. Raises: OSError; UsageError: the
    file is empty."""
    file = os.environ.get("FDSHARE_AUTHKEY_FILE")
    if not file:
        return None
    with open(file, "rb") as stream:
        key = stream.read().strip()
    if not key:
        raise click.UsageError(f"the authkey file {file} is empty")
    return key


def complete_user(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """The users whose name starts with *incomplete*."""
    import pwd

    from click.shell_completion import CompletionItem

    names = {entry.pw_name for entry in pwd.getpwall()}
    return [CompletionItem(name) for name in sorted(names) if name.startswith(incomplete)]


def _complete_name(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """The names that start with *incomplete*; none if the server does not answer at once."""
    from click.shell_completion import CompletionItem

    from fdshare.protocol.names import literal

    with suppress(Exception), client_at(context.params.get("path"), timeout=1.0) as client:
        found = client.names(f"{literal(incomplete)}*")
        return [CompletionItem(name) for name in found if name.isprintable()]
    return []
