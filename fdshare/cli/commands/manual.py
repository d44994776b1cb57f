"""manual: the help of every command as pages for man(1): all on one, or one for each command."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path

import click

from fdshare.cli.support.text_file import write_text
from fdshare.version import __version__

__all__ = ["manual", "pages"]

_EXIT_STATUS = "0; 1 refused or failed; 2 wrong usage; 69 no server; 130 interrupted."
_VARIABLES = {
    "FDSHARE_PATH": "The path of the server; else $XDG_RUNTIME_DIR/fdshare.sock, else "
    "/run/fdshare.sock for root and /tmp/fdshare-UID/fdshare.sock for others.",
    "FDSHARE_AUTHKEY_FILE": "A file with the key that the server was started with.",
    "NO_COLOR": "If set, there are no colours.",
}


@click.command(
    short_help="Print the manual page, for man(1).",
    help="""Print a manual page of all commands.

    An installed fdshare has fdshare(1), and a page for each command: fdshare-run(1).

    \b
    Example:
      fdshare manual | man -l -
    """,
)
@click.option(
    "--folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Write fdshare.1 and a page for each command there instead.",
)
def manual(folder: Path | None) -> None:
    commands = click.get_current_context().find_root().command
    assert isinstance(commands, click.Group)
    if folder is None:
        print("\n".join(_all_on_one(commands)))
        return
    for name, text in pages(commands).items():
        write_text(folder / name, text)


def pages(commands: click.Group) -> dict[str, str]:
    """File name -> text: fdshare.1, and a page for each command. They name no release: what is
    the same in two of them is the same file."""
    found = {"fdshare.1": _overview(commands)}
    for command, context in _each(commands):
        found[f"fdshare-{command.name}.1"] = _page(command, context)
    return {name: "\n".join(lines) + "\n" for name, lines in found.items()}


def _all_on_one(commands: click.Group) -> Iterator[str]:
    yield from _head(commands, f"fdshare {__version__}")
    yield ".SH COMMANDS"
    for command, context in _each(commands):
        usage = " ".join(command.collect_usage_pieces(context))
        yield f".SS fdshare {command.name} {_escaped(usage)}"
        yield from _text(command.help or "")
        yield from _options(command, context)
    yield from _tail()


def _overview(commands: click.Group) -> Iterator[str]:
    yield from _head(commands, "fdshare")
    yield ".SH COMMANDS"
    for command, _ in _each(commands):
        yield f".TP\n.BR fdshare\\-{_escaped(command.name or '')} (1)"
        yield _escaped(command.get_short_help_str(limit=100))
    yield from _tail()


def _page(command: click.Command, context: click.Context) -> Iterator[str]:
    name = _escaped(f"fdshare-{command.name}")
    usage = " ".join(command.collect_usage_pieces(context))
    yield f'.TH {f"fdshare-{command.name}".upper()} 1 "" "fdshare" "User Commands"'
    yield f".SH NAME\n{name} \\- {_escaped(command.get_short_help_str(limit=100).rstrip('.'))}"
    yield f".SH SYNOPSIS\n.B fdshare {_escaped(command.name or '')}\n{_escaped(usage)}"
    yield ".SH DESCRIPTION"
    yield from _text(command.help or "")
    if options := list(_options(command, context)):
        yield ".SH OPTIONS"
        yield from options
    yield ".SH SEE ALSO\n.BR fdshare (1),"
    yield "which has the exit statuses and the variables of the environment."


def _each(commands: click.Group) -> Iterator[tuple[click.Command, click.Context]]:
    context = click.Context(commands, info_name="fdshare")
    for name in commands.list_commands(context):
        command = commands.get_command(context, name)
        assert command is not None
        yield command, click.Context(command, info_name=name, parent=context)


def _head(commands: click.Group, release: str) -> Iterator[str]:
    yield f'.TH FDSHARE 1 "" "{release}" "User Commands"'
    yield ".SH NAME\nfdshare \\- share open descriptors between processes"
    yield ".SH SYNOPSIS\n.B fdshare\n[\\-\\-path PATH] COMMAND [ARGS]..."
    yield ".SH DESCRIPTION"
    yield from _text(commands.help or "")


def _tail() -> Iterator[str]:
    yield f".SH EXIT STATUS\n{_EXIT_STATUS}"
    yield ".SH ENVIRONMENT"
    for variable, text in _VARIABLES.items():
        yield f".TP\n.B {variable}\n{_escaped(text)}"


def _options(command: click.Command, context: click.Context) -> Iterator[str]:
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if isinstance(parameter, click.Option) and record and "--help" not in record[0]:
            yield f".TP\n.B {_escaped(record[0])}\n{_escaped(record[1])}"


def _text(text: str) -> Iterator[str]:
    """Paragraphs; those after click's \\b unchanged."""
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        yield ".PP"
        as_it_is = paragraph.startswith("\b")
        if as_it_is:
            yield ".nf"
        yield _escaped(paragraph.lstrip("\b\n"))
        if as_it_is:
            yield ".fi"


def _escaped(text: str) -> str:
    """groff_char(7): hyphens that can be typed, and no line that looks like a request."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq")
    return "\n".join(
        f"\\&{line}" if line[:1] in (".", "'") else line for line in escaped.split("\n")
    )
