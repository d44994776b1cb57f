"""The rules for names, patterns and metadata, the same for the client and the server."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from fnmatch import translate
from typing import Final

from fdshare.errors import InvalidArgument, InvalidName

__all__ = [
    "MAX_ENTRY_DESCRIPTORS",
    "MAX_KIND",
    "MAX_METADATA",
    "MAX_NAME",
    "MAX_NAMES",
    "MAX_SESSION",
    "check_metadata",
    "check_name",
    "check_pattern",
    "has_wildcards",
    "literal",
    "matcher",
]

MAX_NAME: Final = 255  # bytes of UTF-8; systemd's limit for a descriptor's name, too
# Of one `fetch_many` request: more than there are descriptors in a frame are never answered.
MAX_NAMES: Final = 253
MAX_METADATA: Final = 4096  # bytes of all keys and values together
# A record of the server's journal is one message on a SOCK_SEQPACKET socket. So whatever a client
# can put into one has a bound, and all of it fits into half of the smallest buffer.
MAX_KIND: Final = 16384  # bytes of a kind's tag and spec
MAX_SESSION: Final = 64  # bytes of a client's session id
# SCM_MAX_FD is 253; an entry shares its message with a lifeline, and the journal adds its own.
MAX_ENTRY_DESCRIPTORS: Final = 250

_MAX_PATTERN: Final = 4 * MAX_NAME  # a name whose every character is in brackets, and more
_MAX_WILDCARDS: Final = 64  # each takes up to 30 us to compile, and others wait for it
# What `literal` returns.
_LITERAL: Final = re.compile(r"(?:[^*?\[]|\[[*?[]\])*")
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def check_name(name: str) -> str:
    """*name* itself. Raises: InvalidName, saying which rule it breaks."""
    if not isinstance(name, str):
        raise InvalidName(repr(name), "a name is a str")
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        raise InvalidName(ascii(name), "it cannot be encoded as UTF-8") from None
    if not size:
        raise InvalidName(name, "it is empty")
    if size > MAX_NAME:
        raise InvalidName(name[:40] + "...", f"{size} bytes of UTF-8, at most {MAX_NAME}")
    if _CONTROL.search(name):
        raise InvalidName(name, "it has a control character")
    if "/../" in f"/{name}/":
        raise InvalidName(name, "a part of it is '..'")
    return name


def check_metadata(metadata: Mapping[str, str]) -> None:
    """Raises InvalidArgument if *metadata* is not str to str, or more than 4 KiB in all."""
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise InvalidArgument("metadata", f"str to str only, not {key!r}: {value!r}")
    try:
        size = sum(len(k.encode()) + len(v.encode()) for k, v in metadata.items())
    except UnicodeEncodeError as error:
        reason = f"{error.object!a} cannot be encoded as UTF-8"
        raise InvalidArgument("metadata", reason) from None
    if size > MAX_METADATA:
        raise InvalidArgument("metadata", f"{size} bytes, at most {MAX_METADATA} in all")


def check_pattern(pattern: str) -> None:
    """Raises InvalidArgument if *pattern* is too long, or has too many wildcards."""
    if len(pattern) > _MAX_PATTERN:
        raise InvalidArgument("pattern", f"{len(pattern)} characters, at most {_MAX_PATTERN}")
    count = sum(map(pattern.count, "*?["))
    if count > _MAX_WILDCARDS and _LITERAL.fullmatch(pattern) is None:
        raise InvalidArgument("pattern", f"{count} of '*', '?' and '[', at most {_MAX_WILDCARDS}")


def has_wildcards(pattern: str) -> bool:
    """False if *pattern* matches itself and nothing else."""
    return any(special in pattern for special in "*?[")


def literal(name: str) -> str:
    """The pattern that matches *name* and nothing else, also where it has wildcards in it."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def matcher(pattern: str) -> Callable[[str], object]:
    """A test for names: shell wildcards as in fnmatch(3) without flags; `*` matches `/` too.

    Raises: InvalidArgument: the pattern is too long, or has too many wildcards.
    """
    if pattern == "*":
        return lambda name: True
    check_pattern(pattern)
    if _LITERAL.fullmatch(pattern):
        return re.sub(r"\[(.)\]", r"\1", pattern).__eq__
    return re.compile(translate(pattern)).match
