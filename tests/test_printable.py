"""Text of others: nothing in it ends a line, is obeyed by a terminal, or turns the writing."""

from __future__ import annotations

import json

import pytest

from fdshare.errors import AccessDenied, BadRequest, FdshareError, error_from_wire
from fdshare.printable import printable, printable_json

HOSTILE = "\x1b]0;title\x07\x1b[31m\nforged\r\x7f\x85\u200b\u2028\u202e\u2066\ud800\U000e0001"


@pytest.mark.parametrize("text", ["", "plain", "Grüße, 世界", "a'b\"c\\d"])
def test_what_is_printable_stays(text: str) -> None:
    assert printable(text) == text
    assert printable_json(json.dumps(text, ensure_ascii=False)) == json.dumps(
        text, ensure_ascii=False
    )


def test_what_is_not_is_escaped_and_nothing_else() -> None:
    assert printable("ü\n\x1b\u202e") == "ü\\n\\x1b\\u202e"
    assert printable(HOSTILE).isprintable()


def test_json_says_the_same_as_before() -> None:
    text = json.dumps({"ü" + HOSTILE: HOSTILE}, ensure_ascii=False)
    escaped = printable_json(text)
    assert escaped.isprintable()
    assert "ü" in escaped
    assert json.loads(escaped) == json.loads(text)


@pytest.mark.parametrize(
    "error",
    [
        FdshareError(HOSTILE),
        BadRequest(HOSTILE),
        AccessDenied("fetch", HOSTILE, 1, HOSTILE),
        error_from_wire("of a newer release", {}, HOSTILE),
    ],
)
def test_the_message_of_an_error_is_printable(error: FdshareError) -> None:
    assert str(error).isprintable()
    assert error.message == str(error) == Exception.__str__(error) or isinstance(error, OSError)
