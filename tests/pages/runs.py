"""How one code block of a page is run."""

from __future__ import annotations

import os
import re
import textwrap
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

from conftest import wait_until

from pages.blocks import Block, Command, agree, agree_in_any_order, commands_of
from pages.sandbox import Machine, others_may_run

NUMBERS = r"\d+"


@dataclass(frozen=True)
class NotRun:
    """A block that no test can run, and why."""

    why: str


@dataclass(frozen=True)
class Run:
    """A block that is run as it is pasted: sh and console line by line, python as a program, and a
    file that begins with its path, as a comment, by writing it."""

    given: str = ""  # commands before it, which the page does not show
    around: str = "BLOCK"  # the program whose part it is
    file: str = "program.py"
    command: str = "python program.py"  # what runs a program; empty: a later block does
    says: str | None = None  # what a program prints; None: nothing, or anything while it goes on
    forever: tuple[str, ...] = ()  # beginnings of commands that go on until they are told to end
    stays: bool = False  # they go on to the end of the page
    ended: tuple[int, ...] = ()  # which of them the page itself ends
    before: dict[str, str] = field(default_factory=dict)  # beginning of a command -> one before it
    each: bool = False  # those are alternatives
    then: str = ""  # commands after it, while those go on, as the page would show them
    apart: dict[str, str] = field(default_factory=dict)  # beginning -> why it is not run
    terminal: bool = False  # the page shows one: what goes on prints into what is typed later, too
    typed: tuple[str, ...] = ()  # lines of what the page shows that a person types
    varies: tuple[str, ...] = ()  # patterns of what is another text each time
    needs: tuple[str, ...] = ()  # modules that may not be installed, or "root", to become others

    def missing(self) -> str:
        """What it needs and is not here; empty if it can be run."""
        if "root" in self.needs and os.geteuid() != 0:
            return "root, to become another user, is needed"
        if "root" in self.needs and not others_may_run():
            return "other users may not enter the folder of the interpreter or of the project"
        missing = [n for n in self.needs if n != "root" and find_spec(n) is None]
        return f"{missing[0]} is not installed" if missing else ""


@dataclass(frozen=True)
class Job:
    """A command that goes on."""

    pid: int
    command: Command
    output: str


def run_block(block: Block, how: Run, machine: Machine) -> None:
    """Fails unless it ends as the page says, and prints that."""
    for command in commands_of(how.given):
        expect(command, how, machine)
    if block.language in ("toml", "ini"):
        _write(block, machine)
    jobs = []
    for command in _commands(block, how, machine.folder):
        if command.text.startswith(tuple(how.apart)):
            continue
        for beginning, text in how.before.items():
            if command.text.startswith(beginning):
                machine.run(text)
        if command.text.startswith(how.forever):
            jobs.append(_start(command, len(jobs), machine))
            if how.each:
                _check(how.then, how, machine)
                _end(jobs.pop(), how, machine)
        elif how.terminal:
            _type(command, how, machine)
        else:
            expect(command, how, machine)
    if not how.each:
        _check(how.then, how, machine)
    for number, job in enumerate(jobs):
        if number not in how.ended and not how.stays:
            _end(job, how, machine)


def _commands(block: Block, how: Run, folder: Path) -> list[Command]:
    if block.language == "python":
        before, indent, after = re.split(r"^( *)BLOCK", textwrap.dedent(how.around), flags=re.M)
        (folder / how.file).write_text(before + textwrap.indent(block.text, indent) + after)
        says = "" if how.says is None and not how.forever else how.says
        return [Command(how.command, 0, says)] if how.command else []
    return [] if block.language in ("toml", "ini") else commands_of(block.text)


def _write(block: Block, machine: Machine) -> None:
    """It is a file: its first line is `# PATH` or `# PATH, continued`."""
    path, *continued = block.text.partition("\n")[0].removeprefix("# ").split(",")
    status, said = machine.run(f"cat {'>>' if continued else '>'}{path} <<'END'\n{block.text}END")
    assert status == 0, said


def expect(command: Command, how: Run, machine: Machine) -> None:
    """Runs a command to its end."""
    text, said = command.text, command.said
    for line in how.typed:
        if said is not None and f"{line}\n" in said:
            said = said.replace(f"{line}\n", "", 1)
            text = f"{text} <<'END'\n{line}\nEND"
    status, printed = machine.run(text)
    assert command.status in (None, status), f"$ {text}\nstatus {status}\n{printed}"
    if said is not None:
        assert agree(said, printed, varies=how.varies), f"$ {text}\n{printed}"


def _type(command: Command, how: Run, machine: Machine) -> None:
    """As `expect`, but all write to one terminal, so the order of lines is not always the same."""
    status, _ = machine.run(command.text)
    said: list[str] = []

    def all_came() -> bool:
        said.append(machine.news())
        return agree_in_any_order(command.said or "", "".join(said), varies=how.varies)

    try:
        wait_until(all_came)
    except AssertionError:
        raise AssertionError(f"$ {command.text}\n{''.join(said)}") from None
    assert status == (command.status or 0), f"$ {command.text}\nstatus {status}"


def _check(then: str, how: Run, machine: Machine) -> None:
    for command in commands_of(then):
        expect(replace(command, status=command.status or 0), how, machine)


def _start(command: Command, number: int, machine: Machine) -> Job:
    """It runs in the background; the shell has its pid as $job0, $job1, ..."""
    program = command.text.split("  #")[0].rstrip(" &")
    output = f".job{number}"
    _, said = machine.run(f"( exec {program} ) >{output} 2>&1 & job{number}=$!; echo $!")
    return Job(int(said), command, output)


def _end(job: Job, how: Run, machine: Machine) -> None:
    """Tells it to end, and waits for that."""
    went_on, _ = machine.run(f"jobs -pr | grep -qx {job.pid} && kill {job.pid}")
    machine.run(f"wait {job.pid}")
    _, said = machine.run(f"cat {job.output}")
    assert went_on == 0, f"$ {job.command.text}\nended by itself: {said}"
    if job.command.said is not None:
        assert agree(job.command.said, said, varies=how.varies), f"$ {job.command.text}\n{said}"
