"""What the server knows of the versions of a program: no pid file, and no pid that is another's.

NAME.deployed is the version that serves, NAME.previous what was before it, each an entry with two
descriptors: a pidfd, and sealed memory with the command, its folder and its environment.
NAME.deploying is there while a deploy runs, and ends with it.
"""

from __future__ import annotations

import datetime
import os
import select
import shlex
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

import click
import msgspec

from fdshare.cli.support.fetch_exact import fetch_exact
from fdshare.client.conversation import Exchange
from fdshare.errors import FdshareError, GenerationMismatch, NameNotFound, NameTaken
from fdshare.kernel.ancillary import close_all
from fdshare.kernel.descriptor import Descriptor
from fdshare.kernel.shared_memory import SharedMemory
from fdshare.protocol import messages as m
from fdshare.protocol.kind import Kind
from fdshare.protocol.names import literal

if TYPE_CHECKING:
    from fdshare.client.blocking.client import Client
    from fdshare.client.verbs import Steps

__all__ = ["DEPLOYED", "KIND", "PREVIOUS", "ProgramStart", "Version", "deploying", "now"]

DEPLOYED: Final = ".deployed"
PREVIOUS: Final = ".previous"
_DEPLOYING: Final = ".deploying"
KIND: Final = Kind("deployment", msgspec.Raw(msgspec.msgpack.encode(None)))
_LONGEST_COMMAND: Final = 400  # bytes of it in the metadata, for people


class ProgramStart(msgspec.Struct):
    """How a version was started, for a rollback. Bytes, since none of it need be UTF-8."""

    words: list[bytes]  # NAME[=ADDRESS]
    command: list[bytes]
    folder: bytes
    environment: dict[bytes, bytes]
    readiness: dict[str, str | float] = {}  # the options that tell when it is ready

    @classmethod
    def here(
        cls, words: Sequence[str], command: Sequence[str], readiness: dict[str, str | float]
    ) -> Self:
        """Of this folder and environment."""
        return cls(
            [os.fsencode(word) for word in words],
            [os.fsencode(word) for word in command],
            os.fsencode(os.getcwd()),
            {os.fsencode(key): os.fsencode(value) for key, value in os.environ.items()},
            readiness,
        )


@dataclass(slots=True)
class Version:
    """One version, as the server knows it. Owns its pidfd."""

    pid: int
    program: Descriptor
    start: ProgramStart
    since: str

    @classmethod
    def read(cls, client: Client, entry: str) -> Self | None:
        """The version under *entry*; None if there is none. The caller owns the result.

        What it says is signalled and run with this user's rights, so only this user and root may
        have registered it. Raises: click.ClickException.
        """
        try:
            info = client.info(entry)
        except NameNotFound:
            return None
        fetched = fetch_exact(client, info)
        if fetched is None:  # another deploy replaced it meanwhile
            return cls.read(client, entry)
        given, descriptors = fetched
        try:
            if info.registrant.uid not in (0, os.geteuid()):
                raise _bad(entry, f"it was registered by uid {info.registrant.uid}")
            if given.kind.tag != KIND.tag or len(descriptors) != 2:
                raise _bad(entry, f"it is a {given.kind.tag}")
            program, memory = descriptors
            with memory.dup().open("rb", buffering=0) as file:
                data = os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0)
            start = msgspec.msgpack.decode(data, type=ProgramStart)
            pid = int(given.metadata.get("pid", "0"))
            descriptors.remove(program)
        except (msgspec.MsgspecError, ValueError, OSError) as error:
            raise _bad(entry, str(error)) from None
        finally:
            close_all(descriptors)
        return cls(pid, program, start, given.metadata.get("since", ""))

    def write(self, client: Client, entry: str) -> None:
        """Registers it as *entry*, in place of what is there."""
        command = shlex.join(os.fsdecode(word) for word in self.start.command)
        shown = command.encode(errors="replace")[:_LONGEST_COMMAND].decode(errors="ignore")
        metadata = {"pid": str(self.pid), "since": self.since, "command": shown}
        with SharedMemory.from_bytes(msgspec.msgpack.encode(self.start)) as memory:
            client._do(_register(entry, metadata, [self.program.fileno(), memory.fileno()]))

    def has_ended(self) -> bool:
        """Whether its process has ended."""
        waiting = select.poll()
        waiting.register(self.program.fileno(), select.POLLIN)
        return bool(waiting.poll(0))

    def check_may_stop(self) -> None:
        """Raises: click.ClickException: this user may not signal it; to be told before a new one
        runs."""
        try:
            signal.pidfd_send_signal(self.program.fileno(), 0)
        except ProcessLookupError:
            pass
        except PermissionError:
            raise click.ClickException(
                f"the old version, pid {self.pid}, belongs to another user, who may stop it: "
                "deploy as that user, or as root"
            ) from None

    def close(self) -> None:
        """Closes its descriptor; the program goes on."""
        self.program.close()


def _bad(entry: str, reason: str) -> click.ClickException:
    return click.ClickException(
        f"{entry} is no version that this user has deployed ({reason}): remove it, fdshare rm"
    )


def now() -> str:
    """The time, for people and programs: 2026-11-26T22:10:00+01:00."""
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


@contextmanager
def deploying(client: Client, name: str, waits: Callable[[], None] | None) -> Iterator[None]:
    """Only one deploy of *name* is in here. Another calls *waits* and waits; or is refused, where
    that is None.

    The entry ends with the process. Raises: click.ClickException.
    """
    entry = f"{name}{_DEPLOYING}"
    while True:
        try:
            with Descriptor(os.pidfd_open(os.getpid())) as own:
                client.register(entry, own, if_generation=0, lifetime="connection")
            break
        except (NameTaken, GenerationMismatch):
            if waits is None:
                raise click.ClickException(f"another deploy of {name} runs") from None
            waits()
        _wait_until_gone(client, entry)
    try:
        yield
    finally:
        with suppress(FdshareError):  # somebody removed it, or the server is gone
            client.unregister(entry)


def _wait_until_gone(client: Client, entry: str) -> None:
    with client.watch(literal(entry)) as changes:
        for _ in changes:
            if entry not in changes.held:
                return


# An exchange of its own: the verb of a client registers objects of one descriptor.


def _register(entry: str, metadata: dict[str, str], fds: list[int]) -> Steps[None]:
    yield Exchange(m.Register(name=entry, kind=KIND, replace=True, metadata=metadata), fds)
