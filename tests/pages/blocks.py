"""The code blocks of a page, and the commands in them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_STATUS = re.compile(r"#.*\bstatus (\d+)")
_NUMBERS = r"\d+"


@dataclass(frozen=True)
class Block:
    """One code block as it is written."""

    language: str
    text: str
    line: int  # of its first line, in the page


@dataclass(frozen=True)
class Command:
    """What a person types, and what the page says of it."""

    text: str
    status: int | None  # None: the page shows what it says, and not whether it fails
    said: str | None  # its output; None where the page shows none


def blocks_of(page: Path) -> list[Block]:
    """Those that a reader sees: not {toctree} and other directives of the site."""
    text = page.read_text()
    return [
        Block(match[1], match[2], text.count("\n", 0, match.start()) + 2)
        for match in _FENCE.finditer(text)
        if not match[1].startswith("{")
    ]


def commands_of(text: str) -> list[Command]:
    """The commands of a block: those behind `$ ` with their output, or all of its lines."""
    text = text.strip("\n")
    if text.startswith("$ "):
        parts = re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]
        pairs = [(_continued(part), part) for part in parts]
        return [_command(command, part[len(command) + 1 :]) for command, part in pairs]
    commands: list[Command] = []
    while text:
        command = _continued(text)
        text = text[len(command) + 1 :]
        if command.strip() and not command.startswith("#"):
            commands.append(_command(command, None))
    return commands


def agree(expected: str, actual: str, *, varies: tuple[str, ...] = ()) -> bool:
    """Whether *actual* is what the page shows: spaces count once, `...` is anything, and what the
    patterns of *varies* match may be another text that they match."""
    pattern = _plain(expected, varies)
    regex = re.escape(pattern).replace(re.escape("..."), ".*")
    return re.fullmatch(regex, _plain(actual, varies), re.DOTALL) is not None


def agree_in_any_order(expected: str, actual: str, *, varies: tuple[str, ...] = ()) -> bool:
    """Whether each line of one has a line of the other with which it agrees; a line `...` is any
    number of them."""
    shown, left = expected.splitlines(), list(filter(None, actual.splitlines()))
    for line in shown:
        if line == "...":
            continue
        fits = next((one for one in left if agree(line, one, varies=varies)), None)
        if fits is None:
            return False
        left.remove(fits)
    return not left or "..." in shown


def _plain(text: str, varies: tuple[str, ...]) -> str:
    for pattern in varies:
        text = re.sub(pattern, "<varies>", text)
    return "\n".join(" ".join(line.split()) for line in text.strip().splitlines())


def _continued(text: str) -> str:
    """The first line of *text*, with those that it goes on in."""
    match = re.match(r"(?:.*\\\n)*.*", text)
    assert match is not None
    return match[0]


def _command(text: str, said: str | None) -> Command:
    status = _STATUS.search(text)
    return Command(text, int(status[1]) if status else None if said else 0, said)
