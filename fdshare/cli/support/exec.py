"""Replaces this process with a program that gets descriptors from 3 on, as a service gets them."""

from __future__ import annotations

import fcntl
import os
import signal
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Final, NoReturn

import click
import msgspec

from fdshare.errors import FdshareError, InvalidName

if TYPE_CHECKING:
    from fdshare.kernel.descriptor import Descriptor

__all__ = [
    "CANNOT_EXECUTE",
    "NOT_FOUND",
    "Launch",
    "check_fdnames",
    "find_program",
    "with_own_offset",
]

# The exit status of a shell for a program that could not be started, env(1).
CANNOT_EXECUTE: Final = 126
NOT_FOUND: Final = 127


# What a witness reads: the exec comes next; it has failed.
EXECUTING: Final = b"E"
FAILED: Final = b"F"


class Launch(msgspec.Struct):
    """A command, and what it gets: (name, descriptor) from 3 on, standard streams, variables.

    *pid*: whether LISTEN_PID is set, which a program that a wrapper starts does not have.
    *folder*: where it runs; None: here. *inherited*: the environment that the variables are added
    to. *witness*: one end of a socket pair. EXECUTING is written to it right before the exec, which
    closes it; FAILED if that fails, and then the other end must be closed.
    """

    command: Sequence[str]
    passed: list[tuple[str, Descriptor]] = []
    standard: dict[int, Descriptor] = {}
    environment: dict[str, str] = {}
    witness: Descriptor | None = None
    pid: bool = True
    folder: str | None = None
    inherited: Mapping[str, str] = msgspec.field(default_factory=lambda: os.environ)

    def execute(self) -> NoReturn:
        """Replaces this process with the program, which keeps the pid; does not return.

        Raises: InvalidName; click.ClickException with the status of a shell where the exec fails.
        """
        command = self.arguments()
        environment = self.variables()
        _keep_from_program()
        sys.stdout.flush()
        sys.stderr.flush()
        above = 3 + len(self.passed)
        saved = {number: _copy_above(number, above) for number in self.standard}
        witness = None if self.witness is None else _copy_above(self.witness.fileno(), above)
        if self.witness is not None:
            self.witness.close()
        _place(self._places())
        # Python ignores these signals, and exec(3) keeps that.
        for ignored in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(ignored, signal.SIG_DFL)
        try:
            if witness is not None:
                os.write(witness, EXECUTING)
            os.execvpe(command[0], command, environment)
        except OSError as error:
            if witness is not None:
                os.write(witness, FAILED)
                os.read(witness, 1)
            signal.signal(signal.SIGPIPE, signal.SIG_IGN)
            for number, copy in saved.items():  # for the message
                os.dup2(copy, number)
            raise _not_executed(command[0], error) from None

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
        ours = {key: value for key, value in self.inherited.items() if key not in stale}
        names = [name for name, _ in self.passed]
        passed = child_environment(names) if names else {}
        if not self.pid:
            passed = {k: v for k, v in passed.items() if k not in ("LISTEN_PID", "LISTEN_PIDFDID")}
        return {**ours, **passed, **self.environment}

    def _places(self) -> dict[int, Descriptor]:
        return {**self.standard, **{3 + at: d for at, (_, d) in enumerate(self.passed)}}


def with_own_offset(descriptor: Descriptor) -> Descriptor:
    """*descriptor*, or for sealed memory a new one with an offset of its own, at the beginning.

    Takes *descriptor* over; the caller owns the result.
    """
    link = f"/proc/self/fd/{descriptor.fileno()}"
    try:
        is_memory = os.readlink(link).startswith("/memfd:")
    except OSError:
        return descriptor  # there is no /proc
    if is_memory:
        from fdshare.kernel.descriptor import Descriptor
        from fdshare.kernel.shared_memory import is_sealed

        if is_sealed(descriptor.fileno()):
            with descriptor:
                return Descriptor(os.open(link, os.O_RDONLY | os.O_CLOEXEC))
    return descriptor


def check_fdnames(names: Iterable[str]) -> None:
    """Raises InvalidName, with the way out, for a name that LISTEN_FDNAMES cannot carry."""
    from fdshare.activation import check_fdname

    for name in names:
        try:
            check_fdname(name)
        except InvalidName as error:
            raise InvalidName(
                error.fields["name"],
                f"{error.fields['reason']}; rename it (fdshare mv), or give it to the program as a "
                "standard stream (fdshare run --stdin NAME)",
            ) from None


def find_program(command: Sequence[str]) -> None:
    """Raises the error of a shell if there is no such program, before anything is fetched."""
    if _is_program(command[0]):
        return
    if "/" in command[0] and os.path.exists(command[0]):
        raise _NotExecutable(f"{command[0]}: it cannot be executed")
    raise _NotFound(f"{command[0]}: there is no such program")


def _is_program(name: str) -> bool:
    """Whether an exec would find it; shutil.which() takes ten times as long to import."""
    folders = [""] if "/" in name else os.get_exec_path()
    paths = [os.path.join(folder, name) for folder in folders]
    return any(os.path.isfile(path) and os.access(path, os.X_OK) for path in paths)


def _not_executed(program: str, error: OSError) -> click.ClickException:
    """The error of a shell for an exec that failed."""
    if isinstance(error, FileNotFoundError) and not _is_program(program):
        return _NotFound(f"{program}: there is no such program")
    if isinstance(error, FileNotFoundError):
        return _NotExecutable(f"{program}: its interpreter, or its loader, is missing")
    return _NotExecutable(f"{program}: it cannot be executed: {error.strerror}")


class _NotFound(click.ClickException):
    exit_code = NOT_FOUND


class _NotExecutable(click.ClickException):
    exit_code = CANNOT_EXECUTE


def _copy_above(fd: int, lowest: int) -> int:
    """A copy of *fd* with a number from *lowest* on, closed by an exec."""
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, lowest)


def _keep_from_program() -> None:
    """The descriptors that this process was passed itself are not for the program: `fdshare run` in
    `fdshare run`, or in a unit with sockets."""
    from fdshare.activation import listen_fds_in_order

    try:
        passed = listen_fds_in_order(unset_environment=False)  # close-on-exec from here on
    except FdshareError:  # not what a service manager writes
        return
    for _, descriptor in passed:
        descriptor.detach()


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
