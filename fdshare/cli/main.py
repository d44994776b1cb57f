"""The group of all commands, and the exit status for each exception that they raise.

Exit status: 0; 1 refused or failed; 2 usage; 69 no server (EX_UNAVAILABLE, sysexits.h); 130
interrupted. An error is one line on stderr that says what to do.
"""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from typing import Final

import click

from fdshare.errors import FdshareError, NoServer, ServerGone
from fdshare.kernel.descriptor_table import open_standard_streams
from fdshare.printable import printable
from fdshare.version import __version__

__all__ = ["commands", "run"]

REFUSED: Final = 1
NO_SERVER: Final = 69
INTERRUPTED: Final = 130

# What messages for a program say, and what a person writes.
_OPTIONS: Final = {
    "pass replace=True to put yours": "give --replace to put yours",
    "pass the uid in trust=...": "give --trust USER",
    "pass authkey=...": "set FDSHARE_AUTHKEY_FILE",
}
# Of a write to what has no name: standard output.
_OUTPUT_FAILS: Final = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}

# command -> the file of its family, in the order of `fdshare --help`.
_FAMILIES: Final = {
    "serve": "serve",
    "run": "run",
    "deploy": "deploy",
    "deployments": "deploy",
    "register": "entries",
    "fetch": "entries",
    "take": "entries",
    "rm": "entries",
    "mv": "entries",
    "wait": "watch",
    "watch": "watch",
    "ls": "ls",
    "info": "ls",
    "top": "top",
    "who": "who",
    "explain": "control",
    "dump": "transfer",
    "load": "transfer",
    "transfer": "transfer",
    "stats": "control",
    "ping": "control",
    "reload": "control",
    "upgrade": "control",
    "stop": "control",
    "doctor": "doctor",
    "systemd-units": "systemd_units",
    "demo": "demo",
    "completion": "completion",
    "manual": "manual",
}

# What people type who know other programs.
_MEANT: Final = {
    "list": "ls",
    "ps": "ls",
    "status": "stats or ls",
    "start": "serve",
    "delete": "rm",
    "remove": "rm",
    "unregister": "rm",
    "rename": "mv",
    "move": "mv",
    "get": "fetch",
    "bind": "run",
    "show": "info",
    "kill": "stop",
    "shutdown": "stop",
}


class Commands(click.Group):
    """Imports the module of a command when it is used, so that each starts quickly."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(_FAMILIES)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        family = _FAMILIES.get(name)
        if family is None:
            return None
        module = import_module(f"fdshare.cli.commands.{family}")
        command: click.Command = getattr(module, name.replace("-", "_"))
        return command

    def resolve_command(
        self, context: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As a Group's. Raises: UsageError, with what was meant perhaps."""
        if args[0] in _FAMILIES or args[0].startswith("-"):
            return super().resolve_command(context, args)
        from difflib import get_close_matches

        close = _MEANT.get(args[0]) or " or ".join(get_close_matches(args[0], _FAMILIES))
        hint = f"; did you mean {close}?" if close else ""
        raise click.UsageError(f"there is no command {args[0]!r}{hint}", context)


@click.command(
    cls=Commands,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 88},
    epilog="The server is at --path, $FDSHARE_PATH, $XDG_RUNTIME_DIR/fdshare.sock, or "
    "/run/fdshare.sock for root. fdshare COMMAND --help has an example of each.",
    help="""Share open descriptors between processes: a server holds a socket, a file or a block of
    memory under a name, and gives it to every process that may have it.

    \b
    Example, a port that stays open across deploys:
      fdshare deploy web=tcp://127.0.0.1:8080 -- gunicorn app:app
    """,
)
@click.version_option(__version__, prog_name="fdshare")
@click.option("--path", metavar="PATH", help="The path of the server; for every command.")
@click.pass_context
def commands(context: click.Context, path: str | None) -> None:
    if path == "":  # of a variable that is not set; the default one is another server
        raise click.UsageError("--path is empty")
    if path is not None:
        os.environ["FDSHARE_PATH"] = path
    if context.invoked_subcommand is None:
        # Not no_args_is_help, which is an error of one line since click 8.2.
        click.echo(context.get_help())


def run(arguments: Sequence[str]) -> int:
    """The exit status of one command, which it runs."""
    _open_standard_streams()
    if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:  # the caller's, which exec(3) keeps
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # else there is no child to wait for
    try:
        status = commands.main(list(arguments), "fdshare", standalone_mode=False)
        sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx is not None else "fdshare"
        return _fail(f"{error.format_message().rstrip('.')}; see {command} --help", error.exit_code)
    except click.ClickException as error:
        return _fail(error.format_message(), error.exit_code)
    except FdshareError as error:
        if isinstance(error, NoServer):
            return _fail(error.message + _elsewhere(error.address), NO_SERVER)
        absent = isinstance(error, ServerGone)
        return _fail(_as_option(error.message), NO_SERVER if absent else REFUSED)
    except OSError as error:
        return _fail(_reason(error), REFUSED)
    except (KeyboardInterrupt, click.Abort):
        return INTERRUPTED


def _open_standard_streams() -> None:
    """Opens /dev/null for a standard stream that the caller has closed.

    A socket of the client would get its number, and Python has None where the stream should be.
    """
    open_standard_streams()
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, closefd=False))
    if isinstance(sys.stdout, io.TextIOWrapper):
        # As standard error has it: an escape for what the locale's encoding cannot say.
        sys.stdout.reconfigure(errors="backslashreplace")


def _as_option(message: str) -> str:
    """*message* with the options of the command line where a program passes arguments."""
    for argument, option in _OPTIONS.items():
        message = message.replace(argument, option)
    return message


def _elsewhere(path: str) -> str:
    """Where a server answers instead, if *path* is only the default one."""
    from fdshare.cli.support.other_servers import other_servers
    from fdshare.client.default_path import default_path

    if os.environ.get("FDSHARE_PATH") or path != default_path():
        return ""
    found = other_servers(path)
    return f"; one answers at {', '.join(found)}: give --path, or set FDSHARE_PATH" if found else ""


def _reason(error: OSError) -> str:
    """What to say of *error*; nothing of a reader that has gone (`fdshare ls | head -1`)."""
    if isinstance(error, BrokenPipeError):
        return ""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        with suppress(OSError):  # of the import, where it was not needed before
            from fdshare.kernel.descriptor_limit import descriptor_limit

            return descriptor_limit(error.errno, "command").message
    # Of fork(2): a standard output that is non-blocking says how much it has written.
    if error.filename is None and error.errno == errno.EAGAIN and not _is_of_stream(error):
        with suppress(OSError):
            from fdshare.kernel.process_limit import why_not_forked

            return why_not_forked(error)
    if error.filename is None and (error.errno in _OUTPUT_FAILS or _is_of_stream(error)):
        return f"standard output: {error.strerror}"
    return str(error)


def _is_of_stream(error: OSError) -> bool:
    return hasattr(error, "characters_written")


def _fail(message: str, status: int) -> int:
    """*status*, after *message*."""
    try:
        sys.stdout.flush()
    except OSError as error:
        # The interpreter must not write at exit what cannot be written now.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        message = message or _reason(error)
    if message:
        with suppress(OSError):
            print("fdshare: " + printable(" ".join(message.split())), file=sys.stderr, flush=True)
    return status
