"""The group of all commands, and the exit status for each exception that they raise.

Exit status: 0; 1 refused or failed; 2 usage; 69 no server (EX_UNAVAILABLE, sysexits.h); 130
interrupted. An error is one line on stderr that says what to do.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Final

import click

from fdshare.errors import FdshareError, NoServer, ServerGone
from fdshare.version import __version__

__all__ = ["commands", "run"]

REFUSED: Final = 1
NO_SERVER: Final = 69
INTERRUPTED: Final = 130

# command -> the file of its family, in the order of `fdshare --help`.
_FAMILIES: Final = {
    "serve": "serve",
    "run": "run",
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


@click.command(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 88},
    epilog="The server is at --path, $FDSHARE_PATH, $XDG_RUNTIME_DIR/fdshare.sock, or "
    "/run/fdshare.sock for root. fdshare COMMAND --help has an example of each.",
)
@click.version_option(__version__, prog_name="fdshare")
@click.option("--path", metavar="PATH", help="The path of the server; for every command.")
def commands(path: str | None) -> None:
    """Share open descriptors between processes: a server holds a socket, a file or a block of
    memory under a name, and gives it to every process that may have it.

    \b
    Example, a port that stays open across deploys:
      fdshare serve &
      fdshare run web=tcp://127.0.0.1:8080 -- gunicorn app:app
    """
    if path is not None:
        os.environ["FDSHARE_PATH"] = path


def run(arguments: Sequence[str]) -> int:
    """The exit status of one command, which it runs."""
    try:
        status = commands.main(list(arguments), "fdshare", standalone_mode=False)
        sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx is not None else "fdshare"
        _say(f"{error.format_message().rstrip('.')}; see {command} --help")
        return error.exit_code
    except click.ClickException as error:
        _say(error.format_message())
        return error.exit_code
    except FdshareError as error:
        _say(error.message)
        return NO_SERVER if isinstance(error, NoServer | ServerGone) else REFUSED
    except BrokenPipeError:
        # `fdshare watch | head`: nobody reads any more; the interpreter must not write at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return REFUSED
    except OSError as error:
        _say(str(error))
        return REFUSED
    except (KeyboardInterrupt, click.Abort):
        return INTERRUPTED


def _say(message: str) -> None:
    print("fdshare: " + " ".join(message.split()), file=sys.stderr)
