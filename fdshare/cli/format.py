"""Output: ages, sizes, users and descriptors as text, tables, JSON."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import click

from fdshare.printable import printable, printable_json

if TYPE_CHECKING:
    from fdshare.protocol.messages import DescriptorInfo, EntryInfo

__all__ = [
    "Column",
    "age",
    "descriptor_text",
    "entry_text",
    "json_for_output",
    "plain",
    "print_facts",
    "print_json",
    "print_table",
    "size",
    "user",
]

_MINUTE: Final = 60
_HOUR: Final = 60 * _MINUTE
_DAY: Final = 24 * _HOUR


def age(seconds: float) -> str:
    """*seconds* as a short text: "4s", "3m", "2h", "5d"."""
    for unit, letter in ((_DAY, "d"), (_HOUR, "h"), (_MINUTE, "m")):
        if seconds >= unit:
            return f"{seconds / unit:.0f}{letter}"
    return f"{max(seconds, 0):.0f}s"


def size(count: int) -> str:
    """*count* bytes as text: "512 B", "64 KiB", "1.5 MiB"."""
    amount, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if amount < 1024 or unit == "TiB":
            break
        amount /= 1024
    return f"{amount:.1f}".removesuffix(".0") + f" {unit}"


def user(uid: int) -> str:
    """The name of *uid*, or its number if it has no name."""
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


# Descriptors.


def descriptor_text(info: DescriptorInfo) -> str:
    """One descriptor: "tcp 0.0.0.0:8080 listening 3/128", "/var/log/x rw @1,204"."""
    if info.type == "socket":
        words = _socket(info)
    elif info.type == "memfd":
        sealed = " sealed" if "write" in info.seals else ""
        words = f"memory {size(info.size or 0)}{sealed}"
    elif info.path:
        kind = "" if info.type == "file" else f"{info.type} "
        words = f"{kind}{info.path} {info.access}".rstrip()
        if info.offset is not None and info.type == "file":
            words += f" @{info.offset:,}"
    else:
        words = " ".join(filter(None, (info.type, info.access, info.peer)))
    return f"{words} ({info.health})" if info.health else words


def _socket(info: DescriptorInfo) -> str:
    protocol = {
        ("inet", "stream"): "tcp",
        ("inet6", "stream"): "tcp",
        ("inet", "dgram"): "udp",
        ("inet6", "dgram"): "udp",
        ("unix", "stream"): "unix",
    }.get((info.family, info.socket_type), f"{info.family} {info.socket_type}")
    words = [protocol, info.local]
    if info.listening:
        words.append("listening")
        if info.queue is not None:
            words.append(f"{info.queue}/{info.backlog}")
    elif info.peer:
        words += ["->" if info.local else "to", info.peer]
    elif not info.local:
        words.append("unbound")
    return " ".join(filter(None, words))


def entry_text(entry: EntryInfo) -> str:
    """The descriptors of an entry: the first, and how many more."""
    if not entry.descriptors:
        return f"{entry.count} descriptors"
    more = len(entry.descriptors) - 1
    words = descriptor_text(entry.descriptors[0])
    return f"{words} and {more} more" if more else words


# JSON.


def plain(struct: Any) -> Any:
    """A Struct as plain data with every field, also those that have the default."""
    import msgspec

    if isinstance(struct, msgspec.Struct):
        fields = {f: plain(getattr(struct, f)) for f in struct.__struct_fields__}
        tag = struct.__struct_config__.tag
        return fields if tag is None else {"type": tag, **fields}
    if isinstance(struct, list | tuple):
        return [plain(item) for item in struct]
    if isinstance(struct, Mapping):
        return {key: plain(value) for key, value in struct.items()}
    return struct


def print_json(value: Any) -> None:
    """Prints one line of JSON and flushes it, so that a reader gets it at once."""
    import msgspec

    print(json_for_output(msgspec.json.encode(plain(value)).decode()), flush=True)


def json_for_output(text: str) -> str:
    """*text*, which is JSON in one line, as standard output can say it: some locales' encodings,
    such as ISO 8859-1, have few characters, and all have the escapes of JSON."""
    in_unicode = (sys.stdout.encoding or "utf-8").lower().startswith("utf")
    return printable_json(text, ascii_only=not in_unicode)


# Tables.


def print_facts(facts: Iterable[tuple[str, str]]) -> None:
    """Prints one line for each (title, text)."""
    coloured = _coloured()
    for title, text in facts:
        head = f"{printable(title):<14}"
        print((click.style(head, bold=True) if coloured else head) + printable(text))


class Column(NamedTuple):
    """One column. *give*: how much it is shortened if the table is too wide; 0 is never."""

    title: str
    right: bool = False
    give: int = 0
    colour: str | None = None


def print_table(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table, at most as wide as the terminal; in a pipe it is not shortened."""
    for line in table_lines(columns, rows, _width(), _coloured()):
        print(line)


def _coloured() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def _width() -> int | None:
    if not sys.stdout.isatty() and not os.environ.get("COLUMNS"):
        return None
    import shutil  # with all compressions that it knows

    return shutil.get_terminal_size().columns


def table_lines(
    columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int | None, coloured: bool
) -> list[str]:
    """The lines of a table that is at most *width* wide, if its columns can be shortened so far."""
    clean = [[printable(cell) for cell in row] for row in rows]
    widths = [
        max([len(column.title), *(_cells(row[at]) for row in clean)])
        for at, column in enumerate(columns)
    ]
    if width is not None:
        _narrow(columns, widths, width)
    lines = [_line(columns, widths, [c.title for c in columns], coloured and "title")]
    return lines + [_line(columns, widths, row, coloured and "row") for row in clean]


def _narrow(columns: Sequence[Column], widths: list[int], width: int) -> None:
    """Shortens the columns that may be shortened, the widest most."""
    excess = sum(widths) + 2 * (len(widths) - 1) - width
    while excess > 0:
        spare = [
            (widths[at] * column.give, at)
            for at, column in enumerate(columns)
            if column.give and widths[at] > max(len(column.title), 8)
        ]
        if not spare:
            return
        widths[max(spare)[1]] -= 1
        excess -= 1


def _line(
    columns: Sequence[Column], widths: Sequence[int], cells: Sequence[str], style: str | bool
) -> str:
    shown = []
    for column, width, cell in zip(columns, widths, cells, strict=True):
        text = _fitted(cell, width, column.right)
        if style == "title":
            text = click.style(text, bold=True)
        elif style == "row" and column.colour:
            text = click.style(text, fg=column.colour)
        shown.append(text)
    return "  ".join(shown).rstrip()


def _cells(text: str) -> int:
    """How many cells of a terminal it takes: a character of Chinese takes two."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def _fitted(text: str, width: int, right: bool) -> str:
    """It in *width* cells, shortened or padded."""
    free = width - _cells(text)
    if free >= 0:
        return " " * free + text if right else text + " " * free
    if text.isascii():
        return text[: width - 1] + "…"
    from rich.cells import set_cell_size

    return set_cell_size(text, width - 1) + "…"
