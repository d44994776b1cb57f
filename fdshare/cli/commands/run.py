"""run: starts a program with descriptors that outlive it, as a service manager does."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import click

from fdshare.cli.options import Seconds, client_at, name_argument, or_never
from fdshare.cli.support.exec import Launch, check_fdnames, find_program, with_own_offset
from fdshare.cli.support.program_words import Wanted, WithCommand, split_words
from fdshare.cli.support.wrappers import starts_a_child
from fdshare.kernel.unix_address import absolute
from fdshare.printable import printable

if TYPE_CHECKING:
    from fdshare.cli.support.detached import Detached
    from fdshare.cli.support.listener import Mismatch
    from fdshare.cli.support.output_file import OutputFile
    from fdshare.client.blocking.client import Client
    from fdshare.kernel.descriptor import Descriptor

__all__ = ["get_wanted", "run", "warn_of_wrapper"]


@click.command(
    short_help="Run a program with descriptors that outlive it.",
    cls=WithCommand,
    context_settings={"allow_interspersed_args": False},
    help="""Run CMD with descriptors from 3 on, as LISTEN_FDS, LISTEN_FDNAMES and LISTEN_PID say.

    NAME is registered already; the server binds NAME=ADDRESS if it is not: tcp://HOST:PORT,
    udp://HOST:PORT, unix:///PATH. If something else is registered, it is an error; see --keep and
    --rebind. A UNIX socket whose path is gone is bound anew. {NAME} in CMD becomes the number of
    the descriptor. CMD replaces this process and keeps its pid.

    \b
    Examples:
      fdshare run web=tcp://127.0.0.1:8080 -- gunicorn app:app
      fdshare run web -- uvicorn app:app --fd {web}
      fdshare run --stdout log -- ./report
    """,
)
@click.option("--path", metavar="PATH", help="The path of the server. [env: FDSHARE_PATH]")
@click.option("--trust", metavar="USER", multiple=True, help="Trust a server of this user, too.")
@click.option(
    "--wait",
    type=Seconds(),
    default=0.0,
    metavar="SECONDS",
    help="Wait for names that others register.",
)
@click.option("--stdin", metavar="NAME", help="The program's standard input.")
@click.option("--stdout", metavar="NAME", help="The program's standard output.")
@click.option("--stderr", metavar="NAME", help="The program's standard error.")
@click.option("--start", is_flag=True, help="Start a server if none answers.")
@click.option("--backlog", type=click.IntRange(0), default=4096, show_default=True)
@click.option("--reuse-port", is_flag=True, help="Bind with SO_REUSEPORT.")
@click.option("--keep", is_flag=True, help="Go on with what NAME has, if it is not ADDRESS.")
@click.option("--rebind", is_flag=True, help="Replace what NAME has by ADDRESS, if it is another.")
@click.option(
    "--no-pid", is_flag=True, help="Leave LISTEN_PID out, for a CMD that starts the program."
)
@click.option("--notify", is_flag=True, help="Give CMD a NOTIFY_SOCKET, and store its descriptors.")
@click.option(
    "--detach",
    is_flag=True,
    help="With --notify: run CMD in the background, return at its READY=1.",
)
@click.option(
    "--output",
    metavar="FILE",
    help="With --detach: append the output of CMD here. [default: PATH.NAME.log]",
)
@click.option(
    "--ready-fd", type=int, metavar="N", help="With --notify: write a newline here at READY=1."
)
@click.option(
    "--ready-timeout",
    type=Seconds(),
    default=90.0,
    show_default=True,
    metavar="SECONDS",
    help="With --detach: wait so long for READY=1.",
)
@name_argument("words", nargs=-1, metavar="NAME[=ADDRESS]... [--] CMD...")
def run(path: str | None, trust: tuple[str, ...], words: Sequence[str], **options: Any) -> int:
    wanted, command = split_words(words)
    _check(wanted, options)
    check_fdnames(want.name for want in wanted)
    find_program(command)
    with ExitStack() as stack:
        client = stack.enter_context(client_at(path, trust))
        if options["start"]:
            from fdshare.cli.support.start_server import start_unless_there

            start_unless_there(client)
        launch = _fill(Launch(command, pid=not options["no_pid"]), client, wanted, options, stack)
        warn_of_wrapper(launch)
        if path is not None:
            # If the program uses a server, it uses this one.
            launch.environment["FDSHARE_PATH"] = absolute(client.address)
        if options["detach"]:
            return _detach(client, launch, wanted[0].name, options)
        if not options["notify"]:
            launch.execute()
        from fdshare.cli.support.notify_helper import run_notified

        run_notified(client, launch, wanted[0].name, options["ready_fd"])


def warn_of_wrapper(launch: Launch) -> None:
    """A program that ignores the descriptors binds another address, and clients wait at ours."""
    if not launch.passed or not launch.pid or launch.arguments() != list(launch.command):
        return
    if starts_a_child(launch.command):
        print(
            f"fdshare: {launch.command[0]} starts the program as its child, but LISTEN_PID is the "
            "pid of its parent then: the program may ignore what it is passed; let it exec the "
            "program, or see fdshare run --no-pid",
            file=sys.stderr,
            flush=True,
        )


def _detach(client: Client, launch: Launch, service: str, options: dict[str, Any]) -> int:
    """Starts the program in the background and prints its pid when it is ready."""
    from fdshare.cli.support.detached import Detached, NotReady
    from fdshare.cli.support.interruptions import Interruptions

    with (
        _output(client, launch, service, options["output"]) as output,
        Interruptions() as interruptions,
        Detached.start(client, launch, service, output, options["ready_fd"]) as program,
    ):
        try:
            program.wait(options["ready_timeout"], interruptions)
            _tell_pid(program)
            program.commit()
        except NotReady as error:
            error.tell()
            return error.status
        if output is not None and options["output"] is None:
            print(f"fdshare: {service} writes to {output.path}", file=sys.stderr)
    return 0


def _tell_pid(program: Detached) -> None:
    """Prints it; ends the program if nobody can learn it. Raises: NotReady."""
    try:
        print(program.pid, flush=True)
    except OSError as error:
        program.end(f"the program was ready, but its pid cannot be written: {error.strerror}")


@contextmanager
def _output(
    client: Client, launch: Launch, service: str, file: str | None
) -> Iterator[OutputFile | None]:
    """Where the program writes; None if it has other streams for all of it."""
    from fdshare.cli.support.output_file import OutputFile

    if {1, 2} <= launch.standard.keys():
        yield None
        return
    with OutputFile(file) if file else OutputFile.beside(client.address, service) as output:
        yield output


def _check(wanted: Sequence[Wanted], options: dict[str, Any]) -> None:
    """Raises: click.UsageError for options that do not go together."""
    if options["keep"] and options["rebind"]:
        raise click.UsageError("give one of --keep and --rebind")
    if options["output"] and not options["detach"]:
        raise click.UsageError("--output goes with --detach")
    if options["notify"]:
        if not wanted:
            raise click.UsageError("--notify stores under the first NAME: give one")
        return
    for option in ("detach", "ready_fd", "output"):
        if options[option]:
            raise click.UsageError(f"--{option.replace('_', '-')} goes with --notify")


def _fill(
    launch: Launch,
    client: Client,
    wanted: Sequence[Wanted],
    options: dict[str, Any],
    stack: ExitStack,
) -> Launch:
    """*launch* with all descriptors that were asked for; *stack* closes them."""
    for want in wanted:
        for descriptor in get_wanted(client, want, options):
            launch.passed.append((want.name, stack.enter_context(descriptor)))
    for number, name in enumerate((options["stdin"], options["stdout"], options["stderr"])):
        if name is not None:
            first, *others = get_wanted(client, Wanted(name), options)
            launch.standard[number] = stack.enter_context(first)
            for other in others:
                other.close()
    return launch


def get_wanted(client: Client, want: Wanted, options: dict[str, Any]) -> list[Descriptor]:
    """The descriptors of one name. The caller owns the result."""
    if want.address:
        from fdshare.cli.support.listener import WantedAddress, held_socket

        mismatch: Mismatch = (
            "keep" if options["keep"] else "rebind" if options["rebind"] else "refuse"
        )
        wanted = WantedAddress(
            want.name, want.address, options["backlog"], options["reuse_port"], mismatch
        )
        return [held_socket(client, wanted)]
    from fdshare.client.reachable import why_nobody_can_connect

    fetched = client.fetch_raw(want.name, timeout=or_never(options["wait"]))
    for descriptor in fetched:
        if wrong := why_nobody_can_connect(descriptor.fileno()):
            print(f"fdshare: {printable(f'{want.name}: {wrong}')}", file=sys.stderr, flush=True)
    return list(map(with_own_offset, fetched))
