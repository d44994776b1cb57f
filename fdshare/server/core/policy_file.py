"""A policy as a TOML file: rules as written, and what is wrong with them, by line or key. Pure.

docs/policy.md describes the file.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from fnmatch import translate
from typing import Final, Literal, TypeAlias

import msgspec

from fdshare.errors import InvalidArgument, PolicyError
from fdshare.protocol.bind_address import parse_address
from fdshare.protocol.names import matcher
from fdshare.server.core.policy import SERVER_VERBS, VERBS, Decision, Matcher, Policy, Rule

__all__ = ["policy_from_toml"]

Lookup: TypeAlias = Callable[[str], int]

_HEADER: Final = re.compile(r"^[ \t]*\[\[[ \t]*rule[ \t]*\]\]", re.MULTILINE)
_AT_LINE: Final = re.compile(r"(.*) \(at line (\d+), column \d+\)", re.DOTALL)
# "Expected `str`, got `int` - at `$.rule[1].users[0]`"
_AT_KEY: Final = re.compile(r"(.*) - at `\$\.?(.*)`", re.DOTALL)
_IN_RULE: Final = re.compile(r"rule\[(\d+)\]\.?(.*)")
_SCHEMES: Final = ("tcp://", "udp://")


class _RuleText(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One [[rule]], as written."""

    effect: Literal["allow", "deny"]
    verbs: list[str]
    comment: str = ""
    users: list[str | int] | None = None
    groups: list[str | int] | None = None
    names: list[str] | None = None
    addresses: list[str] | None = None


class _FileText(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    rule: list[_RuleText] = []


class _Fault(Exception):
    """What is wrong with which key of a rule."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(reason)
        self.key = key


def policy_from_toml(
    text: bytes, *, file: str, own_uid: int, uid_of: Lookup, gid_of: Lookup
) -> Policy:
    """The policy that *text* describes; *file* is its name for messages.

    *uid_of* and *gid_of* look a user or group up, and raise KeyError for an unknown one: the policy
    warns of that, and the rule is about the others that it names.
    Raises: PolicyError, with the line or the key, and the reason.
    """
    warnings: list[str] = []
    rules = _read(text, file, uid_of, gid_of, warnings)
    return Policy(own_uid, rules, file=file, warnings=tuple(warnings))


def _read(
    text: bytes, file: str, uid_of: Lookup, gid_of: Lookup, warnings: list[str]
) -> tuple[Rule, ...]:
    """The rules of *text*. Adds to *warnings*. Raises: PolicyError."""
    try:
        source = text.decode()
    except UnicodeDecodeError as error:
        line = text.count(b"\n", 0, error.start) + 1
        raise PolicyError(file, f"line {line}", "it is not UTF-8") from None
    try:
        data = tomllib.loads(source)
    except tomllib.TOMLDecodeError as error:
        reason, line_number = _split(_AT_LINE, str(error))
        where = f"line {line_number or source.count(chr(10)) + 1}"
        raise PolicyError(file, where, reason) from None
    except RecursionError:
        raise PolicyError(file, "the file", "it is nested too deeply") from None
    lines = _rule_lines(source, data)
    try:
        written = msgspec.convert(data, _FileText)
    except msgspec.ValidationError as error:
        reason, key = _split(_AT_KEY, str(error))
        raise PolicyError(file, _where(key, lines), reason) from None
    rules = []
    for number, rule in enumerate(written.rule):
        unknown: list[_Fault] = []
        try:
            rules.append(_rule(rule, number + 1, uid_of, gid_of, unknown))
        except _Fault as fault:
            where = _where(f"rule[{number}].{fault.key}", lines)
            raise PolicyError(file, where, str(fault)) from None
        warnings += [f"{_where(f'rule[{number}].{who.key}', lines)}: {who}" for who in unknown]
    return tuple(rules)


def _split(pattern: re.Pattern[str], message: str) -> tuple[str, str]:
    """The reason and the place in a library's message; the place is empty where it has none."""
    match = pattern.fullmatch(message)
    return (match[1], match[2]) if match else (message, "")


def _rule_lines(source: str, data: dict[str, object]) -> list[int]:
    """The line of each [[rule]]; none where they cannot be told (inline tables, quoted keys)."""
    rules = data.get("rule")
    lines = [source.count("\n", 0, found.start()) + 1 for found in _HEADER.finditer(source)]
    return lines if isinstance(rules, list) and len(lines) == len(rules) else []


def _where(key: str, lines: list[int]) -> str:
    """A key path for people: "rule 2 (line 9), users[0]"."""
    match = _IN_RULE.fullmatch(key)
    if match is None:
        return key or "the file"
    index = int(match[1])
    line = f" (line {lines[index]})" if index < len(lines) else ""
    return f"rule {index + 1}{line}" + (f", {match[2]}" if match[2] else "")


def _rule(
    text: _RuleText, number: int, uid_of: Lookup, gid_of: Lookup, unknown: list[_Fault]
) -> Rule:
    """*text*, checked and with its users and groups looked up; adds to those that are *unknown*.
    Raises: _Fault."""
    for key in ("verbs", "users", "groups", "names", "addresses"):
        if getattr(text, key) == []:
            raise _Fault(key, "an empty list matches nothing; leave the key out to match any")
    label = f"rule {number}" + (f" ({text.comment})" if text.comment else "")
    return Rule(
        decision=Decision(text.effect == "allow", label),
        verbs=_verbs(text),
        uids=_ids(text.users, "users", "user", uid_of, unknown),
        gids=_ids(text.groups, "groups", "group", gid_of, unknown),
        anybody=text.users is None and text.groups is None,
        names=_names(text.names),
        addresses=_addresses(text.addresses),
    )


def _verbs(text: _RuleText) -> frozenset[str]:
    """The verbs, each of which the rule's patterns must be able to match."""
    if text.verbs == ["*"]:
        return frozenset(VERBS)
    for index, verb in enumerate(text.verbs):
        key = f"verbs[{index}]"
        if verb == "rename":
            raise _Fault(key, "a rename is 'unregister' of the old name, 'register' of the new")
        if verb == "ping":
            raise _Fault(key, "every client may ping, no rule is asked")
        if verb not in VERBS:
            raise _Fault(key, f"there is no verb {verb!r}, only '*' alone or {', '.join(VERBS)}")
        if text.names is None and text.addresses is None:
            continue
        if verb in SERVER_VERBS:
            raise _Fault(key, f"{verb!r} is about no name or address; give it a rule without them")
        if verb == "bind" and text.addresses is None:
            raise _Fault(key, "'bind' beside names needs addresses; [\"*\"] is any")
        if verb != "bind" and text.names is None:
            raise _Fault(key, f'{verb!r} beside addresses needs names; ["*"] is any')
    return frozenset(text.verbs)


def _ids(
    given: list[str | int] | None, key: str, what: str, lookup: Lookup, unknown: list[_Fault]
) -> frozenset[int]:
    ids = set()
    for index, who in enumerate(given or ()):
        try:
            number = who if isinstance(who, int) else lookup(who)
        except (KeyError, ValueError):
            unknown.append(_Fault(f"{key}[{index}]", f"there is no {what} {who!r} here"))
            continue
        if not 0 <= number < 2**32 - 1:  # (uid_t) -1 is nobody's, setreuid(2)
            raise _Fault(f"{key}[{index}]", f"{number} is no id")
        ids.add(number)
    return frozenset(ids)


def _names(patterns: list[str] | None) -> tuple[Matcher, ...] | None:
    if patterns is None:
        return None
    for index, pattern in enumerate(patterns):
        if not pattern:
            raise _Fault(f"names[{index}]", "no name is empty; '*' is any")
    return tuple(map(matcher, patterns))


def _addresses(patterns: list[str] | None) -> tuple[Matcher, ...] | None:
    if patterns is None:
        return None
    matchers = []
    for index, pattern in enumerate(patterns):
        try:
            matchers.append(_address_matcher(pattern))
        except InvalidArgument as error:
            raise _Fault(f"addresses[{index}]", error.reason) from None
    return tuple(matchers)


def _address_matcher(pattern: str) -> Matcher:
    """A test for addresses in their one spelling: `*` is anything, all else is itself.

    Not `matcher`: the brackets of [::1] are no character class. Raises: InvalidArgument.
    """
    if pattern.startswith("unix:"):
        raise InvalidArgument(
            "address",
            "only root and the server's own uid may bind UNIX sockets: whoever accepts "
            "on one passes for the server",
        )
    if "*" not in pattern:
        return str(parse_address(pattern)).__eq__
    if pattern != "*" and not pattern.startswith(_SCHEMES):
        parse_address(pattern)  # says what an address looks like
    pattern = pattern.replace("://localhost:", "://127.0.0.1:", 1)
    # What `translate` makes never goes back over what a star has matched: with ".*" for each, a few
    # stars would take seconds for an address of fifty characters.
    only_stars = "".join(f"[{c}]" if c in "?[" else c for c in pattern)
    return re.compile(translate(only_stars)).match
