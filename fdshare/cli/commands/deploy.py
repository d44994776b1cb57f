"""deploy and deployments: the next version of a program beside the old one, which then stops."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import click
from click.core import ParameterSource

from fdshare.cli.format import Column, print_json, print_table
from fdshare.cli.options import (
    Seconds,
    SignalName,
    for_server,
    json_option,
    name_argument,
)
from fdshare.cli.support.deployment import (
    DEPLOYED,
    KIND,
    PREVIOUS,
    ProgramStart,
    Version,
    deploying,
    now,
)
from fdshare.cli.support.exec import Launch, check_fdnames, find_program
from fdshare.cli.support.old_version import PRESETS, Ending, paths_kept
from fdshare.cli.support.program_words import WithCommand, has_command, parse_wanted, split_words
from fdshare.cli.support.progress import Progress
from fdshare.kernel.descriptor import Descriptor
from fdshare.kernel.unix_address import absolute
from fdshare.printable import printable

if TYPE_CHECKING:
    from fdshare.cli.support.detached import Detached, Probe
    from fdshare.cli.support.interruptions import Interruptions
    from fdshare.client.blocking.client import Client

__all__ = ["deploy", "deployments"]

# It says READY=1 before its workers have loaded the application: one of them must accept.
_GUNICORN: Final = "gunicorn"
_FIRST_WORDS: Final = 4  # of a command: among them is the program
# What a version keeps, so that a rollback knows when it is ready. How one is stopped is not kept:
# that was for the one before it, which may have been another program.
_READINESS: Final = ("health", "check", "ready_timeout", "settle")


@click.command(
    short_help="Replace a running program by its next version.",
    cls=WithCommand,
    context_settings={"allow_interspersed_args": False},
    help="""Start CMD beside the version that runs, wait until it is ready, then stop the old one.

    If it does not get ready, or this command is interrupted or killed before, CMD is ended and the
    old version goes on; the status is not 0 then. CMD is ready when it says READY=1, or as --health
    or --check tell; for a rollback, as they told when that version was deployed. The descriptors
    are as those of `fdshare run`; a server is started if there is none.

    \b
    Examples:
      fdshare deploy web=tcp://127.0.0.1:8080 -- gunicorn app:app
      fdshare deploy --health /healthz web -- uvicorn --fd {web} app:app
      fdshare deploy --rollback web
    """,
)
@for_server
@click.option("--health", metavar="TARGET", help="Ready when it answers: tcp, /PATH, http://...")
@click.option("--check", metavar="CMD", help="Ready when CMD, of the shell, succeeds.")
@click.option(
    "--ready-timeout",
    type=Seconds(),
    default=90.0,
    show_default=True,
    metavar="SECONDS",
    help="Wait so long until it is ready.",
)
@click.option(
    "--settle",
    type=Seconds(),
    default=0.0,
    metavar="SECONDS",
    help="It must live so long when it is ready.",
)
@click.option(
    "--drain-signal", type=SignalName(), metavar="SIGNAL", help="Sent to the old one first."
)
@click.option(
    "--drain-time", type=Seconds(), metavar="SECONDS", help="Wait so long after it. [default: 1]"
)
@click.option("--stop-signal", type=SignalName(), metavar="SIGNAL", help="Then. [default: TERM]")
@click.option(
    "--stop-timeout", type=Seconds(), metavar="SECONDS", help="Then kill it. [default: 30]"
)
@click.option(
    "--old", type=click.IntRange(2), multiple=True, metavar="PID", help="It is an old version, too."
)
@click.option("--rollback", is_flag=True, help="NAME alone: start what ran before.")
@click.option("--no-wait", is_flag=True, help="Fail if another deploy of NAME runs.")
@click.option("--output", metavar="FILE", help="Where CMD writes. [default: PATH.NAME.log]")
@click.option("--backlog", type=click.IntRange(0), default=4096, show_default=True)
@click.option("--keep", is_flag=True, help="Go on with what NAME has, if it is not ADDRESS.")
@click.option("--rebind", is_flag=True, help="Replace what NAME has by ADDRESS, if it is another.")
@json_option
@name_argument("words", nargs=-1, metavar="NAME[=ADDRESS]... -- CMD...")
def deploy(client: Client, words: Sequence[str], **options: Any) -> int:
    from fdshare.cli.support.detached import NotReady

    progress = Progress(quiet=options["as_json"])
    given = _given_readiness(options)
    plan = _rolled_back(client, words, given) if options["rollback"] else _planned(words, given)
    _check(plan, {**options, **plan.start.readiness})
    started = time.monotonic()
    report: dict[str, Any] = {"name": plan.name, "ok": False}
    try:
        report |= _deploy(client, plan, options, progress)
    except NotReady as error:
        progress.over()
        report |= {"error": str(error), "status": error.status}
        error.tell()
    if options["as_json"]:
        print_json({**report, "seconds": round(time.monotonic() - started, 3)})
    elif report["ok"]:
        ended = ", ".join(map(str, report["stopped"]))
        print(f"{plan.name}: pid {report['pid']} serves" + (f", {ended} stopped" * bool(ended)))
    return int(report.get("status", 0))


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be started."""

    words: list[str]
    start: ProgramStart

    @property
    def name(self) -> str:
        """The name that the versions are known by: the first."""
        return self.words[0].partition("=")[0]

    @property
    def command(self) -> list[str]:
        return [os.fsdecode(word) for word in self.start.command]


def _given_readiness(options: dict[str, Any]) -> dict[str, str | float]:
    """The options that tell when it is ready, those that were given."""
    source = click.get_current_context().get_parameter_source
    return {key: options[key] for key in _READINESS if source(key) != ParameterSource.DEFAULT}


def _planned(words: Sequence[str], given: dict[str, str | float]) -> Plan:
    wanted, command = split_words(words)
    if not wanted:
        raise click.UsageError("give a NAME")
    find_program(command)
    names = [f"{want.name}={want.address}" if want.address else want.name for want in wanted]
    return Plan(names, ProgramStart.here(names, command, given))


def _rolled_back(client: Client, words: Sequence[str], given: dict[str, str | float]) -> Plan:
    """What ran before, ready as *given* tells, or else as it was. Raises: click.ClickException:
    that is not known."""
    if len(words) != 1 or "=" in words[0] or has_command():
        raise click.UsageError("--rollback goes with one NAME, and no CMD")
    previous = Version.read(client, f"{words[0]}{PREVIOUS}")
    if previous is None:
        raise click.ClickException(f"there is no version of {words[0]} before the one that runs")
    previous.close()
    start = previous.start
    if given.keys() & {"health", "check"}:  # one takes the place of the other
        given = {"health": "", "check": "", **given}
    start.readiness |= given
    return Plan([os.fsdecode(word) for word in start.words], start)


def _check(plan: Plan, options: dict[str, Any]) -> None:
    """Raises: click.UsageError, InvalidName."""
    if options["health"] and options["check"]:
        raise click.UsageError("give one of --health and --check")
    if options["keep"] and options["rebind"]:
        raise click.UsageError("give one of --keep and --rebind")
    if options["health"]:
        from fdshare.cli.support.health import Target

        try:
            Target.parse(options["health"])
        except ValueError as error:
            raise click.UsageError(
                f"--health is tcp, /PATH or http://HOST:PORT/PATH ({error})"
            ) from None
    check_fdnames(want.name for want in parse_wanted(plan.words))


def _deploy(
    client: Client, plan: Plan, options: dict[str, Any], progress: Progress
) -> dict[str, Any]:
    """Starts the new version, then stops the old ones; the report. Raises: NotReady."""
    from fdshare.cli.support.detached import Detached, NotReady
    from fdshare.cli.support.interruptions import Interruptions
    from fdshare.cli.support.output_file import OutputFile
    from fdshare.cli.support.start_server import start_unless_there

    start_unless_there(client)
    with ExitStack() as stack:
        waits = _look(progress, f"another deploy of {plan.name} runs: waits for its end")
        stack.enter_context(deploying(client, plan.name, None if options["no_wait"] else waits))
        if options["rollback"]:
            # Another deploy has ended meanwhile.
            plan = _rolled_back(client, [plan.name], _given_readiness(options))
        options = {**options, **plan.start.readiness}
        olds, former = _old_versions(client, plan, options["old"], stack)
        launch = _launch(client, plan, options, stack)
        listeners = [descriptor for _, descriptor in launch.passed]
        file = options["output"]
        output = OutputFile(file) if file else OutputFile.beside(client.address, plan.name)
        stack.enter_context(output)
        interruptions = stack.enter_context(Interruptions())
        new = stack.enter_context(Detached.start(client, launch, plan.name, output))
        try:
            probe, text = _probe(new, plan, listeners, options, stack)
            _wait(new, probe, text, options, interruptions, progress)
        except NotReady as error:
            if olds:
                error.args = (f"{error}; the old version goes on",)
            raise
        if former is not None:
            former.write(client, f"{plan.name}{PREVIOUS}")
        Version(new.pid, new.program, plan.start, now()).write(client, f"{plan.name}{DEPLOYED}")
        new.commit()
        with paths_kept(listeners):
            for old in olds:
                if warning := _ending(old, options).end(old, progress.step):
                    progress.note(warning)
        progress.over()
        if number := interruptions.received():
            progress.note(f"{number.name} came too late: the old version was stopping")
        if new.has_ended():
            before = "the old version has stopped, and then " if olds else ""
            new.end(f"{before}the new one ended")
    return {"ok": True, "pid": new.pid, "stopped": [old.pid for old in olds]}


def _wait(
    new: Detached,
    probe: Probe | None,
    text: str,
    options: dict[str, Any],
    interruptions: Interruptions,
    progress: Progress,
) -> None:
    """Returns when *new* is ready, as it says or *probe* tells. Raises: NotReady."""
    look = _look(progress, f"pid {new.pid} is started: {text}")
    look()
    new.wait(options["ready_timeout"], interruptions, probe, look)
    if options["settle"]:
        new.settle(
            options["settle"],
            interruptions,
            _look(progress, f"pid {new.pid} must go on for a while"),
        )
    new.go_on(interruptions)


def _look(progress: Progress, text: str) -> Callable[[], None]:
    """What shows that it waits for *text*."""
    return lambda: progress.step(text)


def _probe(
    new: Detached,
    plan: Plan,
    listeners: Sequence[Descriptor],
    options: dict[str, Any],
    stack: ExitStack,
) -> tuple[Probe | None, str]:
    """What tells that it is ready, which *stack* ends, and what that waits for."""
    from fdshare.cli.support.health import CheckCommand, HealthProbe, Target

    if options["check"]:
        check = stack.enter_context(CheckCommand(options["check"], new.pid))
        return check, f"waits for {options['check']}"
    target = options["health"] or ("tcp" if known_program(plan.command, {_GUNICORN}) else None)
    if target is None:
        return None, "waits for READY=1"
    probe = HealthProbe(Target.parse(target), listeners[0], new.pid)
    return probe, f"waits for an answer ({target})"


def _launch(client: Client, plan: Plan, options: dict[str, Any], stack: ExitStack) -> Launch:
    """The program with all its descriptors; *stack* closes them."""
    from fdshare.cli.commands.run import get_wanted, warn_of_wrapper

    start = plan.start
    launch = Launch(plan.command, folder=os.fsdecode(start.folder))
    launch.inherited = {os.fsdecode(k): os.fsdecode(v) for k, v in start.environment.items()}
    launch.environment["FDSHARE_PATH"] = absolute(client.address)
    how = {**options, "reuse_port": False, "wait": 0.0}
    for want in parse_wanted(plan.words):
        for descriptor in get_wanted(client, want, how):
            launch.passed.append((want.name, stack.enter_context(descriptor)))
    warn_of_wrapper(launch)
    return launch


def _old_versions(
    client: Client, plan: Plan, pids: Sequence[int], stack: ExitStack
) -> tuple[list[Version], Version | None]:
    """(those that run, the one to go back to): what is recorded, also by a deploy that was killed,
    and *pids*."""
    known = []
    for suffix in (DEPLOYED, PREVIOUS):
        version = Version.read(client, f"{plan.name}{suffix}")
        if version is not None:
            stack.callback(version.close)
            known.append(version)
    olds = [version for version in known if not version.has_ended()]
    for pid in pids:
        try:
            program = stack.enter_context(Descriptor(os.pidfd_open(pid)))
        except ProcessLookupError:
            raise click.BadParameter(f"there is no process {pid}", param_hint="--old") from None
        if pid not in [old.pid for old in olds]:
            olds.append(Version(pid, program, _start_of(pid, plan), ""))
    for old in olds:
        old.check_may_stop()
    return olds, next(iter([*olds, *known]), None)


def _start_of(pid: int, plan: Plan) -> ProgramStart:
    """How a process was started that no deploy knows, as /proc tells."""
    with open(f"/proc/{pid}/cmdline", "rb") as file:
        command = file.read().rstrip(b"\0").split(b"\0")
    with open(f"/proc/{pid}/environ", "rb") as file:
        pairs = [pair.partition(b"=") for pair in file.read().split(b"\0") if pair]
    folder = os.fsencode(os.readlink(f"/proc/{pid}/cwd"))
    words = [os.fsencode(word) for word in plan.words]
    return ProgramStart(words, command, folder, {key: value for key, _, value in pairs})


def _ending(old: Version, options: dict[str, Any]) -> Ending:
    """How *old* is stopped: by its preset, and what the options say."""
    command = [os.fsdecode(word) for word in old.start.command]
    preset = PRESETS.get(known_program(command, PRESETS), Ending())
    keys = ("drain_signal", "drain_time", "stop_signal", "stop_timeout")
    return replace(preset, **{key: options[key] for key in keys if options[key] is not None})


def known_program(command: Sequence[str], names: Collection[str]) -> str:
    """Which of *names* the command starts, also as `env A=b NAME` or `python -m NAME`; or empty."""
    words = [os.path.basename(word) for word in command[:_FIRST_WORDS]]
    return next((word for word in words if word in names), "")


# What is deployed.

_COLUMNS: Final = (
    Column("NAME", give=1, colour="cyan"),
    Column("VERSION"),
    Column("STATE"),
    Column("PID", right=True),
    Column("SINCE"),
    Column("WAITING", right=True),
    Column("COMMAND", give=1),
)


@click.command(
    short_help="List the versions of deployed programs.",
    help="""List what `fdshare deploy` has started: the version that serves, and the one before it.

    WAITING is how many connections nobody has accepted yet.

    \b
    Example:
      fdshare deployments
    """,
)
@json_option
@for_server
def deployments(client: Client, as_json: bool) -> None:
    found = list(_deployments(client))
    if as_json:
        print_json(found)
        return
    print_table(_COLUMNS, [[printable(str(value)) for value in each.values()] for each in found])


def _deployments(client: Client) -> Iterator[dict[str, Any]]:
    entries = client.infos()
    queues = {e.name: e.descriptors[0].queue for e in entries if e.descriptors}
    for entry in entries:
        for suffix, version in ((DEPLOYED, "deployed"), (PREVIOUS, "previous")):
            if entry.kind != KIND.tag or not entry.name.endswith(suffix):
                continue
            name = entry.name.removesuffix(suffix)
            ended = not entry.descriptors or bool(entry.descriptors[0].health)
            yield {
                "name": name,
                "version": version,
                "state": "ended" if ended else "runs",
                "pid": int(entry.metadata.get("pid", "0")),
                "since": entry.metadata.get("since", ""),
                "waiting": queues.get(name) or 0,
                "command": entry.metadata.get("command", ""),
            }
