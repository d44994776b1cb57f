"""Replaces this process with a program that gets descriptors from 3 on, as a service gets them."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NoReturn

import click

if TYPE_CHECKING:
    from fdshare.kernel.descriptor import Descriptor

__all__ = ["CANNOT_EXECUTE", "NOT_FOUND", "Launch", "find_program", "with_own_offset"]

# The exit status of a shell for a program that could not be started, env(1).
CANNOT_EXECUTE: Final = 126
NOT_FOUND: Final = 127


@dataclass(slots=True)
class Launch:
    """A command, and what it gets: (name, descriptor) from 3 on, standard streams, variables."""

    command: Sequence[str]
    passed: list[tuple[str, Descriptor]] = field(default_factory=list)
    standard: dict[int, Descriptor] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)

    def execute(self) -> NoReturn:
        """Replaces this process with the program, which keeps the pid; does not return.

        Raises: click.BadParameter, InvalidName; OSError where the exec fails.
        """
        command = self.arguments()
        environment = self.variables()
        _place(self._places())
        # Python ignores these signals, and exec(3) keeps that.
        for number in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)
        sys.stdout.flush()
        sys.stderr.flush()
        os.execvpe(command[0], command, environment)

    def arguments(self) -> list[str]:
        """The command with each {NAME} as the number of the first descriptor of that name."""
        numbers: dict[str, int] = {}
        for number, (name, _) in enumerate(self.passed, 3):
            numbers.setdefault(f"{{{name}}}", number)
        return [_replaced(argument, numbers) for argument in self.command]

    def variables(self) -> dict[str, str]:
        """The environment of the program. Raises: InvalidName."""
        from fdshare.activation import child_environment

        stale = ("LISTEN_PID", "LISTEN_PIDFDID", "LISTEN_FDS", "LISTEN_FDNAMES")
        ours = {key: value for key, value in os.environ.items() if key not in stale}
        names = [name for name, _ in self.passed]
        return {**ours, **(child_environment(names) if names else {}), **self.environment}

    def _places(self) -> dict[int, Descriptor]:
        return {**self.standard, **{3 + at: d for at, (_, d) in enumerate(self.passed)}}


def with_own_offset(descriptor: Descriptor) -> Descriptor:
    """*descriptor*, or for sealed memory a new one with an offset of its own, at the beginning.

    Takes *descriptor* over; the caller owns the result.
    """
    from fdshare.kernel.descriptor import Descriptor
    from fdshare.kernel.shared_memory import is_sealed

    link = f"/proc/self/fd/{descriptor.fileno()}"
    try:
        if os.readlink(link).startswith("/memfd:") and is_sealed(descriptor.fileno()):
            with descriptor:
                return Descriptor(os.open(link, os.O_RDONLY | os.O_CLOEXEC))
    except OSError:
        pass  # there is no /proc
    return descriptor


def find_program(command: Sequence[str]) -> None:
    """Raises the error of a shell if there is no such program, before anything is fetched."""
    if shutil.which(command[0]) is not None:
        return
    if "/" in command[0] and os.path.exists(command[0]):
        raise _NotExecutable(f"{command[0]}: it cannot be executed")
    raise _NotFound(f"{command[0]}: there is no such program")


class _NotFound(click.ClickException):
    exit_code = NOT_FOUND


class _NotExecutable(click.ClickException):
    exit_code = CANNOT_EXECUTE


def _place(places: Mapping[int, Descriptor]) -> None:
    """Gives every descriptor its number, inheritable; first moves them all above these numbers."""
    above = max(places, default=2) + 1
    # Close-on-exec: the program gets only the copies at the right numbers.
    moved = {
        number: fcntl.fcntl(descriptor.fileno(), fcntl.F_DUPFD_CLOEXEC, above)
        for number, descriptor in places.items()
    }
    for number, source in moved.items():
        os.dup2(source, number, inheritable=True)


def _replaced(argument: str, numbers: Mapping[str, int]) -> str:
    for placeholder, number in numbers.items():
        argument = argument.replace(placeholder, str(number))
    return argument
