"""Words for people: ages, sizes, descriptors, tables."""

from __future__ import annotations

import json

import pytest
from rich.cells import cell_len

from fdshare.cli.format import (
    Column,
    age,
    descriptor_text,
    entry_text,
    plain,
    print_json,
    printable,
    size,
    table_lines,
)
from fdshare.protocol.messages import DescriptorInfo, EntryInfo, Registrant, SnapshotPart


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "0s"), (59, "59s"), (60, "1m"), (7200, "2h"), (86400 * 5, "5d"), (-1, "0s")],
)
def test_age(seconds: float, words: str) -> None:
    assert age(seconds) == words


@pytest.mark.parametrize(
    ("count", "words"),
    [(0, "0 B"), (1023, "1023 B"), (65536, "64 KiB"), (3 << 19, "1.5 MiB"), (1 << 50, "1024 TiB")],
)
def test_size(count: int, words: str) -> None:
    assert size(count) == words


TCP = {"type": "socket", "access": "rw", "family": "inet", "socket_type": "stream"}
UNIX = {"type": "socket", "access": "rw", "family": "unix", "socket_type": "stream"}


@pytest.mark.parametrize(
    ("info", "words"),
    [
        (
            {**TCP, "local": "0.0.0.0:8080", "listening": True, "queue": 3, "backlog": 128},
            "tcp 0.0.0.0:8080 listening 3/128",
        ),
        ({**TCP, "local": "1.2.3.4:5", "peer": "6.7.8.9:10"}, "tcp 1.2.3.4:5 -> 6.7.8.9:10"),
        ({**TCP}, "tcp unbound"),
        ({**TCP, "socket_type": "dgram", "local": "[::1]:53"}, "udp [::1]:53"),
        ({**UNIX, "peer": "pid 12"}, "unix to pid 12"),
        ({**UNIX, "local": "/run/x", "listening": True}, "unix /run/x listening"),
        ({**UNIX, "socket_type": "seqpacket"}, "unix seqpacket unbound"),
        (
            {"type": "file", "access": "rw", "path": "/var/log/app.log", "offset": 1204},
            "/var/log/app.log rw @1,204",
        ),
        ({"type": "memfd", "size": 64 << 20, "seals": ["write"]}, "memory 64 MiB sealed"),
        ({"type": "memfd", "size": 5}, "memory 5 B"),
        ({"type": "pipe", "access": "r"}, "pipe r"),
        ({"type": "pidfd", "peer": "pid 3", "health": "it ended"}, "pidfd pid 3 (it ended)"),
        ({"type": "tty", "access": "rw", "path": "/dev/pts/1"}, "tty /dev/pts/1 rw"),
    ],
)
def test_what(info: dict[str, object], words: str) -> None:
    assert descriptor_text(DescriptorInfo(**info)) == words


def test_whats_counts() -> None:
    pipe = DescriptorInfo("pipe", access="r")
    entry = EntryInfo("n", 1, "descriptor", Registrant(1, 0, 0), 0.0, 2, descriptors=[pipe, pipe])
    assert entry_text(entry) == "pipe r and 1 more"


COLUMNS = [Column("NAME", give=1), Column("WHAT", give=2), Column("N", right=True)]


def test_a_table_is_as_wide_as_its_cells() -> None:
    assert table_lines(COLUMNS, [["web", "tcp", "7"]], None, False) == [
        "NAME  WHAT  N",
        "web   tcp   7",
    ]


def test_a_table_fits_the_terminal() -> None:
    rows = [["n" * 60, "w" * 80, "123456"]]
    for width in range(30, 170):
        lines = table_lines(COLUMNS, rows, width, False)
        assert max(map(len, lines)) <= width
        assert lines[1].endswith("123456")
        assert ("…" in lines[1]) is (width < 150)


def test_a_wide_character_takes_two_cells() -> None:
    assert table_lines(COLUMNS, [["新网站", "tcp", "7"], ["größe", "udp", "8"]], None, False) == [
        "NAME    WHAT  N",
        "新网站  tcp   7",
        "größe   udp   8",
    ]
    for width in range(21, 40):
        (_, line) = table_lines(COLUMNS, [["网" * 9, "w" * 9, "7"]], width, False)
        assert cell_len(line) <= width
        assert line.endswith(" 7")
        assert ("…" in line) is (width < 32)


def test_the_terminal_obeys_no_name() -> None:
    (_, row) = table_lines([Column("NAME")], [["a\x1b[31mb"]], None, True)
    assert "\x1b[31m" not in row
    assert printable("größe") == "größe"


def test_json_has_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    print_json([EntryInfo("n", 1, "socket", Registrant(1, 0, 0), 0.0, 1)])
    (found,) = json.loads(capsys.readouterr().out)
    assert set(found) == set(EntryInfo.__struct_fields__)
    assert found["ttl"] is None
    assert plain(SnapshotPart(1, {}))["type"] == "snapshot"
