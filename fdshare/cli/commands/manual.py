"""manual: the help of every command as one page for man(1)."""

from __future__ import annotations

import inspect

import click

from fdshare.version import __version__

__all__ = ["manual"]


@click.command(
    short_help="Print the manual page, for man(1).",
    help="""Print a manual page of all commands.

    \b
    Example:
      fdshare manual | man -l -
    """,
)
def manual() -> None:
    commands = click.get_current_context().find_root().command
    assert isinstance(commands, click.Group)
    print(f'.TH FDSHARE 1 "" "fdshare {__version__}" "User Commands"')
    print(".SH NAME\nfdshare \\- share open descriptors between processes")
    print(".SH SYNOPSIS\n.B fdshare\n[\\-\\-path PATH] COMMAND [ARGS]...")
    print(".SH DESCRIPTION")
    _print_text(commands.help or "")
    print(".SH COMMANDS")
    context = click.Context(commands, info_name="fdshare")
    for name in commands.list_commands(context):
        command = commands.get_command(context, name)
        assert command is not None
        _print_command(command, click.Context(command, info_name=name, parent=context))
    print(".SH EXIT STATUS")
    print("0; 1 refused or failed; 2 wrong usage; 69 no server; 130 interrupted.")
    print(".SH ENVIRONMENT")
    for variable, text in _VARIABLES.items():
        print(f".TP\n.B {variable}\n{_escaped(text)}")


_VARIABLES = {
    "FDSHARE_PATH": "The path of the server; else $XDG_RUNTIME_DIR/fdshare.sock, else "
    "/run/fdshare.sock for root and /tmp/fdshare-UID/fdshare.sock for others.",
    "FDSHARE_AUTHKEY_FILE": "A file with the key that the server was started with.",
    "NO_COLOR": "If set, there are no colours.",
}


def _print_command(command: click.Command, context: click.Context) -> None:
    usage = " ".join(command.collect_usage_pieces(context))
    print(f".SS fdshare {command.name} {_escaped(usage)}")
    _print_text(command.help or "")
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if isinstance(parameter, click.Option) and record and "--help" not in record[0]:
            print(f".TP\n.B {_escaped(record[0])}\n{_escaped(record[1])}")


def _print_text(text: str) -> None:
    """Prints paragraphs; those after click's \\b unchanged."""
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        print(".PP")
        as_it_is = paragraph.startswith("\b")
        if as_it_is:
            print(".nf")
        print(_escaped(paragraph.lstrip("\b\n")))
        if as_it_is:
            print(".fi")


def _escaped(text: str) -> str:
    """groff_char(7): hyphens that can be typed, and no line that looks like a request."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq")
    return "\n".join(
        f"\\&{line}" if line[:1] in (".", "'") else line for line in escaped.split("\n")
    )
