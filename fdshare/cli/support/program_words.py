"""The words of run and deploy: NAME[=ADDRESS]... [--] CMD..."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import click

__all__ = ["Wanted", "WithCommand", "has_command", "parse_wanted", "split_words"]

_COMMAND: Final = "fdshare.command"


class Wanted(NamedTuple):
    """NAME, or NAME=ADDRESS, which is bound if nothing is registered under NAME."""

    name: str
    address: str = ""


class WithCommand(click.Command):
    """Leaves all words after the first `--` to `split_words`, options too."""

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        if "--" in args:
            at = args.index("--")
            context.meta[_COMMAND] = args[at + 1 :]
            args = args[:at]
            context.allow_interspersed_args = True
        return super().parse_args(context, args)


def has_command() -> bool:
    """Whether there was a `--`."""
    return _COMMAND in click.get_current_context().meta


def split_words(words: Sequence[str]) -> tuple[list[Wanted], list[str]]:
    """The names and the command.

    Without `--` between them the first word is a name, and the words after it that have an address.
    """
    command: list[str] | None = click.get_current_context().meta.get(_COMMAND)
    names = list(words)
    if command is None:
        at = 1
        while at < len(words) and "://" in words[at].partition("=")[2]:
            at += 1
        names, command = names[:at], names[at:]
    if not command:
        path = click.get_current_context().command_path
        raise click.UsageError(f"there is no CMD; write {path} NAME -- CMD")
    return parse_wanted(names), command


def parse_wanted(words: Sequence[str]) -> list[Wanted]:
    """NAME[=ADDRESS] each. Raises: InvalidArgument: no address."""
    wanted = []
    for word in words:
        name, _, address = word.partition("=")
        if address:
            from fdshare.protocol.bind_address import parse_address

            parse_address(address)  # before another address is bound
        wanted.append(Wanted(name, address))
    return wanted
