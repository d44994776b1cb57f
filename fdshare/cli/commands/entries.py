"""register, fetch, take, rm, mv: one entry, from a shell."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager
from typing import IO, TYPE_CHECKING, Any, Final

import click

from fdshare.cli.format import print_json
from fdshare.cli.options import Seconds, for_server, json_option, name_argument, or_never
from fdshare.cli.support.exec import Launch, check_fdnames, find_program, with_own_offset

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fdshare.cli.support.claim import Claim
    from fdshare.client.blocking.client import Client
    from fdshare.kernel.descriptor import Descriptor

__all__ = ["fetch", "mv", "register", "rm", "take"]

_PATIENCE: Final = 10.0  # seconds that `take --cat` waits for a stream before it removes the name


@click.command(
    help="""Register something under NAME.

    ADDRESS is tcp://HOST:PORT, udp://HOST:PORT or unix:///PATH.

    \b
    Examples:
      fdshare register log --open /var/log/app.log --mode a
      fdshare register web --listen tcp://127.0.0.1:8080
      fdshare register input --fd 5  5< data.csv
    """,
)
@click.argument("name")
@click.option(
    "--fd", type=click.IntRange(0), metavar="N", help="Register descriptor N, which was inherited."
)
@click.option("--listen", "address", metavar="ADDRESS", help="Register a new socket, bound here.")
@click.option("--open", "file", metavar="FILE", help="Register a file.")
@click.option("--mode", default="r", show_default=True, help="For --open, as Python's open().")
@click.option("--memory", metavar="FILE", help="Register sealed memory with the content of FILE.")
@click.option("--replace", is_flag=True, help="Replace what is registered.")
@click.option(
    "--if-generation",
    type=click.IntRange(0),
    metavar="N",
    help="Replace it if its generation is still N.",
)
@click.option(
    "--ttl", type=Seconds(endless=False), metavar="SECONDS", help="Remove it after so long."
)
@click.option(
    "--grace",
    type=Seconds(endless=False),
    default=0.0,
    metavar="SECONDS",
    help="With --hold: keep it so much longer.",
)
@click.option("--drop-on-hangup", is_flag=True, help="Remove it when its peer hangs up.")
@click.option("--meta", multiple=True, metavar="KEY=VALUE", help="Metadata to keep with it.")
@click.option("--hold", is_flag=True, help="Keep it only while this command runs.")
@json_option
@for_server
def register(
    client: Client, name: str, meta: Sequence[str], hold: bool, as_json: bool, **options: Any
) -> None:
    given = [o for o in ("fd", "address", "file", "memory") if options[o] is not None]
    if len(given) != 1:
        raise click.UsageError("give one of --fd, --listen, --open and --memory")
    if options["grace"] and not hold:
        raise click.UsageError("--grace goes with --hold")
    with _source(options) as obj:
        entry = client.register(
            name,
            obj,
            replace=options["replace"],
            if_generation=options["if_generation"],
            lifetime="connection" if hold else "server",
            ttl=options["ttl"],
            grace=options["grace"],
            drop_on_hangup=options["drop_on_hangup"],
            metadata=_metadata(meta),
        )
    if as_json:
        print_json({"name": entry.name, "generation": entry.generation})
        sys.stdout.flush()
    if hold:
        _hold(client, name)


def _metadata(words: Sequence[str]) -> dict[str, str]:
    pairs = [word.partition("=") for word in words]
    if bad := [key for key, equals, _ in pairs if not equals]:
        raise click.BadParameter(f"{bad[0]!r} is not KEY=VALUE", param_hint="--meta")
    return {key: value for key, _, value in pairs}


@contextmanager
def _source(options: dict[str, Any]) -> Iterator[Any]:
    """The object to register, closed afterwards if it was made here."""
    if options["fd"] is not None:
        yield _inherited(options["fd"])
    elif options["address"] is not None:
        from fdshare.server.loop.binding import bind_address

        with bind_address(options["address"], backlog=4096, reuse_port=False) as sock:
            yield sock
    elif options["file"] is not None:
        try:
            stream: IO[Any] = open(options["file"], options["mode"])
        except ValueError as error:
            raise click.BadParameter(str(error), param_hint="--mode") from None
        with stream:
            yield stream
    else:
        with _sealed(options["memory"]) as memory:
            yield memory


def _inherited(number: int) -> Any:
    """A socket as a socket, so that it is fetched as one; anything else as a descriptor."""
    import socket
    import stat

    try:
        mode = os.fstat(number).st_mode
    except OSError:
        raise click.BadParameter(
            f"descriptor {number} is not open; write --fd {number} {number}< FILE",
            param_hint="--fd",
        ) from None
    return socket.socket(fileno=os.dup(number)) if stat.S_ISSOCK(mode) else number


@contextmanager
def _sealed(file: str) -> Iterator[Any]:
    """Sealed shared memory with the content of *file*."""
    from fdshare.kernel.shared_memory import SharedMemory

    with open(file, "rb") as stream:
        data = stream.read()
    memory = SharedMemory.from_bytes(data)
    try:
        yield memory
    finally:
        memory.close()


def _hold(client: Client, name: str) -> None:
    """Waits for SIGINT, SIGTERM or SIGHUP. Raises: click.ClickException: the entry is gone."""
    from fdshare.cli.support.interruptions import Interruptions

    with Interruptions() as interruptions, client._lifeline.hand_over() as lifeline:
        waiting = select.poll()
        waiting.register(interruptions.fileno(), select.POLLIN)
        waiting.register(lifeline, 0)  # POLLHUP needs no request: no server has the entry
        while interruptions.received() is None:
            if lifeline.fileno() in dict(waiting.poll()):
                raise click.ClickException(f"{name} is held no more")


# To get it back.


def _fetch_options(command: Any) -> Any:
    for option in (
        click.argument("command", nargs=-1, metavar="[-- CMD...]"),
        name_argument(),
        click.option("--cat", is_flag=True, help="Copy its content to standard output."),
        click.option(
            "--wait", type=Seconds(), default=0.0, metavar="SECONDS", help="Wait for it to appear."
        ),
    ):
        command = option(command)
    return command


@click.command(
    short_help="Give what is registered to a program, or print its content.",
    help="""Run CMD with what is registered under NAME, as `fdshare run` does, or print its content.

    --check looks for what `ls` says in brackets: a path that is gone, a peer that is gone, a queue
    that is full. Alone it does nothing else.

    \b
    Examples:
      fdshare fetch config --cat
      fdshare fetch web -- ./server --fd {web}
      fdshare fetch web --check && echo clients can connect
    """,
)
@_fetch_options
@click.option("--check", is_flag=True, help="Fail if the kernel says that something is wrong.")
@for_server
def fetch(
    client: Client, name: str, command: Sequence[str], cat: bool, wait: float, check: bool
) -> None:
    from fdshare.client import verbs

    if not check or command or cat:
        _check_use(name, command, cat)
    verb = verbs.fetch_raw if command or cat else verbs.look_raw
    with ExitStack() as stack:
        descriptors = _owned(client._do(verb(name, or_never(wait))), stack)
        if check:
            _check_health(name, descriptors)
        if command or cat:
            _use(descriptors, name, command, cat)


def _check_health(name: str, descriptors: Sequence[Descriptor]) -> None:
    """Raises: click.ClickException: what is wrong with one of them."""
    from fdshare.server.loop.inspect import describe_descriptor

    for descriptor in descriptors:
        if wrong := describe_descriptor(descriptor.fileno()).health:
            raise click.ClickException(f"{name}: {wrong}")


@click.command(
    short_help="As fetch, and remove the name.",
    help="""As fetch, and NAME is removed: no other process gets it.

    It is removed when CMD runs, or when its content was written; if that fails, it stays. A stream,
    which cannot be read twice, is removed when its first bytes were written.

    \b
    Example:
      fdshare take job -- ./work --input {job}
    """,
)
@_fetch_options
@for_server
def take(client: Client, name: str, command: Sequence[str], cat: bool, wait: float) -> None:
    from fdshare.cli.support import claim as claims

    _check_use(name, command, cat)
    with ExitStack() as stack:
        descriptors, claim = claims.Claim.of(client, name, or_never(wait))
        stack.enter_context(claim)
        _use(_owned(descriptors, stack), name, command, cat, claim)


def _check_use(name: str, command: Sequence[str], cat: bool) -> None:
    if bool(command) == cat:
        raise click.UsageError("give -- CMD, or --cat")
    if command:
        find_program(command)
        check_fdnames([name])


def _owned(descriptors: list[Descriptor], stack: ExitStack) -> list[Descriptor]:
    """*descriptors* for a program, which *stack* closes."""
    return [stack.enter_context(with_own_offset(descriptor)) for descriptor in descriptors]


def _use(
    descriptors: list[Descriptor],
    name: str,
    command: Sequence[str],
    cat: bool,
    claim: Claim | None = None,
) -> None:
    """Runs *command* with *descriptors*, or prints the content of the first; then *claim* is
    confirmed."""
    if cat:
        _cat(descriptors[0].fileno(), claim.confirm if claim is not None else lambda: None)
        return
    launch = Launch(command, [(name, descriptor) for descriptor in descriptors])
    if claim is not None:
        launch.witness = claim.confirm_at_exec()
    launch.execute()


def _cat(fd: int, written: Callable[[], None]) -> None:
    """Copies to standard output: a file from its beginning, anything else until its end.

    The offset of a file, which all processes share that have it, is not moved. *written* is called
    at the end; for what can be read only once, after the first bytes.
    """
    import stat

    output = sys.stdout.fileno()
    seekable = stat.S_ISREG(os.fstat(fd).st_mode)
    # The lease of a take ends after a minute.
    if not seekable and not _poll(fd, select.POLLIN, _PATIENCE):
        written()
    at = 0
    while data := os.pread(fd, 1 << 16, at) if seekable else _read(fd):
        at += len(data)
        _write(output, data)
        if not seekable:
            written()
    written()


# Either may be non-blocking: that is of the open file, and another process may have set it.


def _read(fd: int) -> bytes:
    while True:
        try:
            return os.read(fd, 1 << 16)
        except BlockingIOError:
            _poll(fd, select.POLLIN)


def _write(fd: int, data: bytes) -> None:
    """All of *data*."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:
            _poll(fd, select.POLLOUT)


def _poll(fd: int, events: int, seconds: float | None = None) -> bool:
    """Whether it is ready, or has failed, within *seconds*."""
    waiting = select.poll()
    waiting.register(fd, events)
    return bool(waiting.poll(None if seconds is None else seconds * 1000))


@click.command(
    help="""Remove NAMES from the server. A process that fetched them keeps its own.

    If one cannot be removed, the others are; the status is 1 then.

    \b
    Examples:
      fdshare rm web
      fdshare rm --pattern 'web/*'
    """,
)
@name_argument("names", nargs=-1)
@click.option(
    "--if-generation", type=click.IntRange(1), metavar="N", help="Remove this generation only."
)
@click.option("--pattern", metavar="PATTERN", help="Remove what matches, too; * matches / as well.")
@for_server
def rm(client: Client, names: Sequence[str], if_generation: int | None, pattern: str | None) -> int:
    if not names and pattern is None:
        raise click.UsageError("give NAMES, or --pattern")
    matching = [] if pattern is None else client.names(pattern)
    status = 0
    for name in dict.fromkeys([*names, *matching]):
        try:
            client.unregister(name, if_generation=if_generation)
        except (KeyError, ValueError, PermissionError) as error:  # of this name
            print(f"fdshare: {error}", file=sys.stderr)
            status = 1
    return status


@click.command(
    help="""Rename OLD to NEW, in one step.

    With --replace there are two: NEW is replaced, then OLD is removed.

    \b
    Example:
      fdshare mv web web-old
    """,
)
@name_argument("old")
@click.argument("new")
@click.option("--replace", is_flag=True, help="Replace what NEW is.")
@for_server
def mv(client: Client, old: str, new: str, replace: bool) -> None:
    from fdshare.cli.commands.transfer import move_over

    if not replace:
        client.rename(old, new)
    elif old != new:
        move_over(client, old, new)
    else:
        client.info(old)  # which must be there
