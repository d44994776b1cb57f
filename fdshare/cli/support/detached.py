"""run --detach: a program in the background, from its start until it is ready.

Until then it ends with who waits for it: at a signal, after the timeout, and if that process is
killed (the helper sees that).
"""

from __future__ import annotations

import os
import select
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NoReturn, Self, TypeAlias

import click

from fdshare.cli.support.exec import CANNOT_EXECUTE, NOT_FOUND
from fdshare.cli.support.notify_helper import (
    COMMITTED,
    READY,
    Helper,
    notify_socket,
    speaks_for_others,
    take_ready_fd,
)
from fdshare.cli.support.notify_store import stored
from fdshare.cli.support.program_group import GRACE, end_group
from fdshare.errors import UnsupportedPlatform
from fdshare.kernel.ancillary import close_all
from fdshare.kernel.descriptor import Descriptor
from fdshare.printable import printable

if TYPE_CHECKING:
    from fdshare.cli.support.exec import Launch
    from fdshare.cli.support.interruptions import Interruptions
    from fdshare.cli.support.output_file import OutputFile
    from fdshare.client.blocking.client import Client

__all__ = ["Detached", "NotReady", "Probe"]

# What is wrong with a program that is not ready yet; empty when it is ready.
Probe: TypeAlias = Callable[[], str]

_LOOK: Final = 0.2  # seconds between two probes


class NotReady(Exception):
    """The program did not become ready, and has ended.

    *status* is that of the command, *output* what the program wrote last, which nobody sees
    otherwise.
    """

    def __init__(self, reason: str, status: int = 1, output: OutputFile | None = None) -> None:
        super().__init__(reason)
        self.status = status
        self._lines: list[str] = []
        if output is not None and (lines := output.last_lines()):
            self._lines = [f"fdshare: the last lines of {output.path}:"]
            self._lines += [f"    {line}" for line in lines]

    def tell(self, more: str = "") -> None:
        """Prints it all on standard error."""
        for line in [*self._lines, f"fdshare: {self}{more}"]:
            print(printable(line), file=sys.stderr, flush=True)


@dataclass(slots=True)
class Detached:
    """A program in the background, a child of this process. Owns its descriptors, not the program.

    It ends with this process, until it is committed. *said*: READY when it is ready, and the end
    when it has ended.
    """

    pid: int
    program: Descriptor
    said: Descriptor
    output: OutputFile | None
    committed: bool = False

    @classmethod
    def start(
        cls,
        client: Client,
        launch: Launch,
        service: str,
        output: OutputFile | None,
        ready_fd: int | None = None,
    ) -> Self:
        """The program, just started: with a NOTIFY_SOCKET, what it stored, its output in *output*,
        and nothing else of this process. The caller owns the result. Raises: OSError,
        click.BadParameter; UnsupportedPlatform: there is no /proc."""
        if not os.path.exists("/proc/self/fd"):
            # What lists what we have open, and the processes of a program that is to end.
            raise UnsupportedPlatform(
                "a program in the background", "no /proc: mount it, or run it in the foreground"
            )
        take_ready_fd(ready_fd)
        kept = stored(client, service)
        launch.passed += kept
        sock = notify_socket()
        launch.environment["NOTIFY_SOCKET"] = sock.address
        speaks = speaks_for_others()
        said, says = (Descriptor(end.detach()) for end in socket.socketpair())
        waits, goes = map(Descriptor, os.pipe())
        pid = os.fork()
        if pid == 0:
            goes.close()
            _become(launch, output, waits)
        waits.close()
        program = Descriptor(os.pidfd_open(pid))
        stderr = 2 if output is None else output.descriptor.fileno()
        if 2 in launch.standard:
            stderr = launch.standard[2].fileno()
        try:
            Helper(client, service, sock, program, pid, speaks, says, ready_fd, stderr).fork()
            os.write(goes.fileno(), b"G")
        except BaseException:  # nobody would wait for it
            end_group(program, pid, GRACE, own=True)
            raise
        finally:
            says.close()
            goes.close()
            close_all(descriptor for _, descriptor in kept)
        return cls(pid, program, said, output)

    def wait(
        self,
        timeout: float,
        interruptions: Interruptions,
        probe: Probe | None = None,
        look: Callable[[], None] = lambda: None,
    ) -> None:
        """Returns when it is ready: it has said so, or *probe* finds nothing wrong.

        *look* is called meanwhile.

        Raises: NotReady, and then it has ended.
        """
        waiting = select.poll()
        waiting.register(self.said.fileno(), select.POLLIN)
        waiting.register(interruptions.fileno(), select.POLLIN)
        deadline = time.monotonic() + timeout
        wrong = ""
        while (left := deadline - time.monotonic()) > 0:
            ready = dict(waiting.poll(min(left, _LOOK) * 1000))
            if self.said.fileno() in ready:
                if os.read(self.said.fileno(), 1) != READY:
                    self._unattended()
                if probe is None:
                    return
            self.go_on(interruptions)
            if probe is not None and not (wrong := probe()):
                return
            look()
        why = f" ({wrong})" if wrong else ""
        self.end(f"the program was not ready within {timeout:g} s{why}")

    def go_on(self, interruptions: Interruptions) -> None:
        """Raises: NotReady: a signal came, or the program has ended; it has in both cases."""
        number = interruptions.received()
        if number is not None:
            self.end(f"{number.name} came: the program was not ready yet", 128 + number)
        if self.has_ended():
            self._has_ended()

    def settle(
        self, seconds: float, interruptions: Interruptions, look: Callable[[], None]
    ) -> None:
        """Returns after *seconds* in which it did not end. Raises: NotReady."""
        until = time.monotonic() + seconds
        self.wait(
            2 * seconds + _LOOK,
            interruptions,
            lambda: "" if time.monotonic() >= until else "it has to settle",
            look,
        )

    def has_ended(self) -> bool:
        """Whether its process has ended."""
        waiting = select.poll()
        waiting.register(self.program.fileno(), select.POLLIN)
        return bool(waiting.poll(0))

    def commit(self) -> None:
        """From here on it goes on when this process ends. Raises: NotReady: its helper has ended,
        and so has it."""
        try:
            os.write(self.said.fileno(), COMMITTED)
        except BrokenPipeError:
            self._unattended()
        self.committed = True

    def end(self, reason: str, status: int = 1) -> NoReturn:
        """Ends the program. Raises: NotReady, always."""
        end_group(self.program, self.pid, GRACE, own=True)
        raise NotReady(f"{reason}, and is ended", status, self.output)

    def _unattended(self) -> NoReturn:
        """The helper has ended: with the program, or because somebody killed it."""
        if self.has_ended():
            self._has_ended()
        self.end("the program has lost the helper that hears its notifications")

    def _has_ended(self) -> NoReturn:
        _, status = os.waitpid(self.pid, 0)
        code = os.waitstatus_to_exitcode(status)
        end_group(self.program, self.pid, GRACE, own=False)  # what a wrapper has left
        shell_code = code if code in (CANNOT_EXECUTE, NOT_FOUND) else 1
        reason = f"the program ended with status {code} before it was ready"
        if code == 0:
            reason += "; if it goes to the background by itself, have it stay in the foreground"
        raise NotReady(reason, shell_code, self.output)

    def close(self) -> None:
        """Closes its descriptors; the program goes on."""
        self.program.close()
        self.said.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        if kind is not None and not issubclass(kind, NotReady) and not self.committed:
            end_group(self.program, self.pid, GRACE, own=True)
        self.close()


def _become(launch: Launch, output: OutputFile | None, waits: Descriptor) -> NoReturn:
    """Replaces the forked child with the program, once *waits* tells that the helper is there.

    Without it nobody would end the program of a process that is killed now.
    """
    status = NOT_FOUND
    try:
        os.setsid()
        if not os.read(waits.fileno(), 1):
            os._exit(status)
        if launch.folder is not None:
            os.chdir(launch.folder)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        if output is not None:
            os.dup2(output.descriptor.fileno(), 1)
            os.dup2(output.descriptor.fileno(), 2)
        _inherit_nothing()
        launch.execute()
    except click.ClickException as error:
        status = error.exit_code
        print(f"fdshare: {error.format_message()}", file=sys.stderr, flush=True)
    except BaseException as error:
        print(f"fdshare: {printable(str(error))}", file=sys.stderr, flush=True)
    finally:
        os._exit(status)


def _inherit_nothing() -> None:
    """What the caller has open, a lock or the pipe of a CI, is not for a program that outlives
    it."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2:
            with suppress(OSError):
                os.set_inheritable(int(name), False)
