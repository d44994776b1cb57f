"""Starts a server in the background, as a child of init, where none answers."""

from __future__ import annotations

import errno
import os
import stat
import sys
from typing import TYPE_CHECKING

import click

from fdshare.cli.support.orphan import fork_orphan
from fdshare.client.default_path import make_own_folder
from fdshare.errors import EndpointError, NoServer
from fdshare.kernel.unix_address import absolute, file_type, is_abstract, trouble

if TYPE_CHECKING:
    from fdshare.client.blocking.client import Client

__all__ = ["not_started", "open_log", "start_unless_there"]


def start_unless_there(client: Client) -> None:
    """Returns when a server answers at the client's address; starts one if none does.

    Its warnings go to PATH.log. Two callers at the same time start one server.
    Raises: EndpointError; `not_started`.
    """
    try:
        client.ping()
        return
    except NoServer:
        pass
    said = _start(client.address)
    try:
        client.ping()
    except NoServer:
        raise not_started(said) from None
    if not said:
        print(f"fdshare: started a server at {client.address}", file=sys.stderr)


def not_started(wrote: str) -> click.ClickException:
    """The error for a server that ended at its start, after it *wrote* why."""
    return click.ClickException(
        wrote.strip().removeprefix("fdshare: ") or "the server ended at its start"
    )


def _start(path: str) -> str:
    """Starts a server; returns "" when it is ready, else what it wrote."""
    path = absolute(path)
    make_own_folder(path)
    log = open_log(path)
    before = os.fstat(log).st_size
    ready, readies = os.pipe()
    try:
        arguments = ["serve", path, "--ready-fd", str(readies), "--log-level", "warning"]
        _spawn_orphan(_command(arguments), log, readies)
        os.close(readies)
        readies = -1
        if os.read(ready, 1):
            return ""
        return os.pread(log, 4096, before).decode(errors="replace").strip()
    finally:
        for fd in (log, ready, readies):
            if fd >= 0:
                os.close(fd)


def open_log(path: str) -> int:
    """PATH.log of a server in the background, opened to append; /dev/null for an abstract name.

    The caller owns the result. Raises: EndpointError, with the way out.
    """
    if is_abstract(path):
        return os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    path = f"{path}.log"
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        log = os.open(path, flags, 0o600)
    except OSError as error:
        raise trouble(path, error) from None
    found = os.fstat(log)
    # In a folder that others may write, it could be theirs, to read and to change.
    if not stat.S_ISREG(found.st_mode) or found.st_uid not in (0, os.geteuid()):
        os.close(log)
        what = f"{file_type(found.st_mode)} of uid {found.st_uid}"
        raise EndpointError(path, f"it is {what}; remove it, or choose another path", errno.EACCES)
    return log


def _command(arguments: list[str]) -> list[str]:
    """The command that runs this program with other *arguments*."""
    if os.path.basename(sys.argv[0]) == "fdshare" and os.path.isfile(sys.argv[0]):
        return [sys.executable, os.path.abspath(sys.argv[0]), *arguments]
    from fdshare.server.interpreter import fresh_interpreter

    return fresh_interpreter("fdshare.cli.main", f"run({arguments!r})")


def _spawn_orphan(command: list[str], log: int, readies: int) -> None:
    """Starts *command* as a child of init, and outside the service that this process may be.

    As our child it would send SIGCHLD to the program that replaces this process.
    """
    from fdshare.kernel.descriptor_table import close_all_but
    from fdshare.server.failover.service_manager import leave_service

    if not fork_orphan():
        return
    try:
        nothing = os.open(os.devnull, os.O_RDWR)
        for target, source in enumerate((nothing, nothing, log)):
            os.dup2(source, target)
        # It must not keep a caller's pipe open: somebody may wait for the end of that.
        close_all_but({readies})
        os.set_inheritable(readies, True)
        os.chdir("/")
        leave_service()
        os.execv(command[0], command)
    finally:
        os._exit(0)
