"""Tracebacks as data: rebuilt from what was checked, refused where it is anything else."""

from __future__ import annotations

import json
import subprocess
import sys
import traceback
from typing import Any

import pytest

from fdshare.kernel.remote import MAX_FRAMES, describe, refusal

MARK = b"\x1efdshare-traceback "


def recurse(depth: int) -> None:
    if depth == 0:
        raise ValueError("at the bottom")
    recurse(depth - 1)


def failure(depth: int) -> ValueError:
    try:
        recurse(depth)
    except ValueError as error:
        return error
    raise AssertionError


def frames_of(said: bytes) -> list[str]:
    return [frame.name for frame in traceback.extract_tb(refusal(1, said).__traceback__)]


@pytest.mark.parametrize("depth", [0, 1, 50])
def test_there_and_back(depth: int) -> None:
    said = describe(failure(depth), True)
    assert b"\0" not in said
    assert frames_of(said) == ["failure"] + ["recurse"] * (depth + 1)
    assert str(refusal(1, said)) == "ValueError: at the bottom"


def test_of_many_frames_the_innermost_travel() -> None:
    limit = sys.getrecursionlimit()
    said = describe(failure(min(400, limit // 2)), True)
    assert frames_of(said) == ["recurse"] * MAX_FRAMES


def test_what_has_no_traceback_is_text() -> None:
    assert describe(ValueError("x"), True) == b"ValueError: x"
    assert describe(failure(1), False) == b"ValueError: at the bottom"


def test_a_separator_in_the_text_forges_nothing() -> None:
    said = describe(ValueError((MARK + b"[]").decode()), False)
    assert refusal(1, said).__traceback__ is None
    assert MARK not in said


def frame(**changes: Any) -> dict[str, Any]:
    """A record of one frame."""
    code = {
        "co_filename": changes.get("filename", "f.py"),
        "co_name": changes.get("name", "g"),
    }
    return {
        "tb_frame": {
            "f_globals": changes.get("scope", {}),
            "f_locals": {},
            "f_code": code,
            "f_lineno": changes.get("line", 1),
        },
        "tb_lineno": changes.get("line", 1),
        "tb_next": changes.get("next"),
    }


def nested(depth: int) -> dict[str, Any] | None:
    result = None
    for _ in range(depth):
        result = frame(next=result)
    return result


@pytest.mark.parametrize(
    "record",
    [
        None,
        [],
        {},
        "text",
        7,
        {"tb_frame": None},
        frame(name=3),
        frame(name="a\0b"),
        frame(filename=None),
        frame(filename="x" * 5000),
        frame(line="1"),
        frame(line=-1),
        frame(line=2**31),
        frame(line=1.5),
        frame(next=[]),
        frame(next="more"),
        nested(MAX_FRAMES + 1),
    ],
    ids=lambda record: str(record)[:30],
)
def test_records_that_are_none_stay_text(record: object) -> None:
    said = b"Oops" + MARK + json.dumps(record).encode()
    error = refusal(1, said)
    assert error.__traceback__ is None
    assert str(error) == said.decode()


@pytest.mark.parametrize("tail", [b"", b"{", b"\xff", b"[" * 100_000, b'{"tb_frame":' * 50_000])
def test_records_that_are_not_json_stay_text(tail: bytes) -> None:
    assert refusal(1, b"Oops" + MARK + tail).__traceback__ is None


def test_whoever_prints_it_reads_no_file_that_is_none() -> None:
    """linecache opens what a frame names: a FIFO or a terminal would hang the reader."""
    said = b"Oops" + MARK + json.dumps(frame(filename="/dev/tty")).encode()
    entries = traceback.extract_tb(refusal(1, said).__traceback__)
    assert [entry.filename for entry in entries] == ["</dev/tty>"]


def test_globals_of_the_peer_are_not_taken() -> None:
    scope = {"__builtins__": {}, "__traceback_maker": "x", "__loader__": "evil"}
    said = b"Oops" + MARK + json.dumps(frame(scope=scope)).encode()
    rebuilt = refusal(1, said).__traceback__
    assert rebuilt is not None
    assert "__loader__" not in rebuilt.tb_frame.f_globals


@pytest.mark.parametrize("spare", [0, 1])
def test_without_a_free_descriptor_the_text_arrives(spare: int) -> None:
    """tblib cannot be imported then."""
    code = f"""if True:
        import os, resource
        from fdshare.kernel.remote import describe
        number = os.dup(0)
        resource.setrlimit(resource.RLIMIT_NOFILE, (number + 1 + {spare},) * 2)
        try:
            raise ValueError("here")
        except ValueError as error:
            print(describe(error, True).partition(b"\\x1e")[0].decode())
    """
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "ValueError: here\n"
