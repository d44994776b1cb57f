"""systemd-units: the units of a server, with the path of this very fdshare."""

from __future__ import annotations

import os
import sys
import zipfile
from importlib.resources import files
from pathlib import Path
from typing import Final

import click

from fdshare.cli.support.text_file import write_text

__all__ = ["systemd_units"]

_UNITS: Final = ("fdshare.service", "fdshare.socket")
_PROGRAM: Final = "/usr/bin/fdshare"  # in the units as they come
_SYSTEM_ONLY: Final = "# Not in a unit of a user"  # before lines up to the next empty one


@click.command(
    name="systemd-units",
    short_help="Write the units for systemd.",
    help="""Write fdshare.service and fdshare.socket, with the path of this fdshare.

    Without --dir they go to /etc/systemd/system, with --user to ~/.config/systemd/user. Change them
    in drop-ins: systemctl edit fdshare.service.

    \b
    Example:
      fdshare systemd-units && systemctl enable --now fdshare.socket
    """,
)
@click.option("--user", is_flag=True, help="For systemctl --user.")
@click.option("--dir", "folder", type=click.Path(path_type=Path), metavar="DIR", help="Where to.")
@click.option("--force", is_flag=True, help="Replace units that are there.")
def systemd_units(user: bool, folder: Path | None, force: bool) -> None:
    folder = folder or _default_folder(user)
    texts = {name: _text(name, user) for name in _UNITS}
    changed = [name for name in _UNITS if _differs(folder / name, texts[name])]
    if changed and not force:
        raise click.ClickException(f"{folder / changed[0]} is another one; --force replaces it")
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        write_text(folder / name, text)
        print(folder / name, flush=True)
    systemctl = "systemctl --user" if user else "systemctl"
    click.echo(
        f"now: {systemctl} daemon-reload && {systemctl} enable --now fdshare.socket", err=True
    )


def _default_folder(user: bool) -> Path:
    if not user:
        return Path("/etc/systemd/system")
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config", "systemd", "user")


def _differs(path: Path, text: str) -> bool:
    """Whether there is another file at *path*."""
    try:
        return path.read_text() != text
    except FileNotFoundError:
        return False


def _text(name: str, user: bool) -> str:
    """The unit *name*, as it comes, with the path of this fdshare."""
    text = (files("fdshare.cli") / "units" / name).read_text()  # fdshare may lie in a zip file
    if user:
        before, _, after = text.partition(_SYSTEM_ONLY)
        text = before + after.partition("\n\n")[1] + after.partition("\n\n")[2]
        text = text.replace("/run/fdshare.sock", "%t/fdshare.sock")
        text = text.replace("multi-user.target", "default.target")
    return text.replace(_PROGRAM, _program())


def _program() -> str:
    """This fdshare, as the first words of an ExecStart= (systemd.service(5))."""
    script = os.path.abspath(sys.argv[0])
    if os.path.basename(script) == "fdshare" and os.path.isfile(script):
        return _quoted(script)
    if zipfile.is_zipfile(script):
        return f"{_quoted(sys.executable)} {_quoted(script)}"
    return f"{_quoted(sys.executable)} -m fdshare"


def _quoted(path: str) -> str:
    path = path.replace("%", "%%").replace("$", "$$")
    if path.isascii() and not set(path) & set(" \"'\\;"):
        return path
    escaped = path.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
