"""Names, metadata and patterns: the rules of both sides."""

from __future__ import annotations

import fnmatch
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fdshare.errors import InvalidArgument, InvalidName
from fdshare.protocol.names import (
    MAX_METADATA,
    MAX_NAME,
    check_metadata,
    check_name,
    has_wildcards,
    literal,
    matcher,
)


@pytest.mark.parametrize("name", ["a", "-", "a:b", "/", "a/b", "...", "a..b", "é" * 127, "x" * 255])
def test_names(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("", "empty"),
        ("x" * 256, "256 bytes"),
        ("é" * 128, "256 bytes"),
        ("a\0", "control"),
        ("\n", "control"),
        ("\x1f", "control"),
        ("\x7f", "control"),
        ("\x80", "control"),
        ("\x9f", "control"),
        ("..", "'..'"),
        ("../a", "'..'"),
        ("a/..", "'..'"),
        ("a/../b", "'..'"),
        ("\ud800", "UTF-8"),
        (b"a", "str"),
        (None, "str"),
        (5, "str"),
    ],
)
def test_no_names(name: Any, word: str) -> None:
    with pytest.raises(InvalidName) as caught:
        check_name(name)
    assert word in caught.value.reason
    assert str(caught.value).isprintable()


@given(st.text())
def test_any_text_is_a_name_or_refused(name: str) -> None:
    try:
        assert check_name(name) == name
    except InvalidName:
        return
    assert 1 <= len(name.encode()) <= MAX_NAME
    assert ".." not in name.split("/")
    assert not any(ord(c) < 32 or 127 <= ord(c) < 160 for c in name)


def test_metadata() -> None:
    check_metadata({})
    check_metadata({"a": "b", "": ""})
    check_metadata({"k": "v" * (MAX_METADATA - 1)})
    check_metadata({"é" * 2048: ""})
    for bad in (
        {"k": "v" * MAX_METADATA},
        {"é" * 2049: ""},
        {1: "x"},
        {"x": b"y"},
        {"x": "\udc00"},
    ):
        with pytest.raises(InvalidArgument) as caught:
            check_metadata(bad)  # type: ignore[arg-type]
        assert caught.value.argument == "metadata"


@given(st.text(max_size=12), st.text(alphabet="ab*?[]!-^\\/", max_size=12))
@example("\n", "*")
@example("a\nb", "a*b")
def test_patterns_are_those_of_fnmatch(name: str, pattern: str) -> None:
    assert bool(matcher(pattern)(name)) == fnmatch.fnmatchcase(name, pattern)
    if not has_wildcards(pattern):
        assert bool(matcher(pattern)(name)) == (name == pattern)


@given(st.text(alphabet="ab*?[]!-^\\&~|/", min_size=1, max_size=12), st.text(max_size=12))
def test_a_pattern_that_is_a_name_in_brackets(name: str, other: str) -> None:
    escaped = "".join(f"[{c}]" if c in "*?[" else c for c in name)
    assert matcher(escaped)(name)
    assert bool(matcher(escaped)(other)) == (name == other)


def test_long_patterns() -> None:
    assert matcher("x" * MAX_NAME)("x" * MAX_NAME)
    assert matcher("[*]" * MAX_NAME)("*" * MAX_NAME)
    with pytest.raises(InvalidArgument):
        matcher("[" * 10_000)
    with pytest.raises(InvalidArgument):
        matcher("x" * 10_000)


@pytest.mark.parametrize("wild", ["*a", "?", "[a-z]", "*?", "[ab]*"])
def test_few_wildcards_are_compiled(wild: str) -> None:
    """Each costs time, and the server makes everybody wait for it."""
    each = sum(map(wild.count, "*?["))
    many = wild * (64 // each)
    assert matcher(many)("a" * 64) is not None
    with pytest.raises(InvalidArgument, match=r"at most 64"):
        matcher(many + wild)
    assert matcher(literal(many + wild))(many + wild)
    with pytest.raises(InvalidArgument):
        matcher(literal(many + wild) + "*")


@pytest.mark.parametrize("name", ["web", "a*b", "a?b", "a[b]c", "*", "[", "]", "[!a]"])
def test_a_literal_pattern_matches_its_name_alone(name: str) -> None:
    matches = matcher(literal(name))
    assert matches(name)
    for other in ("a", "ab", "aXb", "abc", "", name + "x", "x" + name):
        assert not matches(other)
