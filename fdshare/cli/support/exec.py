"""Becoming another program, with descriptors from 3 on as a service manager passes them."""

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

__all__ = ["CANNOT_EXECUTE", "NOT_FOUND", "Launch", "find_program", "with_own_position"]

# What a shell's status says of a program that could not be started, env(1).
CANNOT_EXECUTE: Final = 126
NOT_FOUND: Final = 127


@dataclass(slots=True)
class Launch:
    """What the program will find: (name, descriptor) from number 3 on, and its standard ones."""

    command: Sequence[str]
    passed: list[tuple[str, Descriptor]] = field(default_factory=list)
    standard: dict[int, Descriptor] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)

    def execute(self) -> NoReturn:
        """Replaces this process; returns never. The program's pid is this one's.

        Raises: click.BadParameter, InvalidName; OSError where the exec fails.
        """
        command = self.arguments()
        environment = self.variables()
        _place(self._places())
        # Python ignores them, and what is ignored stays so across exec.
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


def with_own_position(descriptor: Descriptor) -> Descriptor:
    """*descriptor*, or for sealed memory a new one that only this reader moves: who reads it as a
    file begins at its beginning. Takes *descriptor* over; the caller owns the result."""
    from fdshare.kernel.descriptor import Descriptor
    from fdshare.kernel.shared_memory import is_sealed

    link = f"/proc/self/fd/{descriptor.fileno()}"
    try:
        if os.readlink(link).startswith("/memfd:") and is_sealed(descriptor.fileno()):
            with descriptor:
                return Descriptor(os.open(link, os.O_RDONLY | os.O_CLOEXEC))
    except OSError:
        pass  # no /proc: then it stays as it is
    return descriptor


def find_program(command: Sequence[str]) -> None:
    """Raises what a shell would say, before anything is fetched or taken."""
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
    """dup2(2) of every descriptor to its number, inheritable; first out of each other's way."""
    above = max(places, default=2) + 1
    # Close-on-exec, so that the program gets the copies at the right numbers alone.
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
