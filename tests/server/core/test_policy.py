"""policy: the default, rules case by case, and a small model that must agree in every case."""

from __future__ import annotations

import ast
import fnmatch
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdshare.server import core
from fdshare.server.core.policy import SERVER_VERBS, VERBS, Policy, Subject
from server.core.test_policy_file import ALICE, BOB, FILE, GROUPS, OWN, USERS, policy


def who(uid: int, gid: int = 100, *groups: int) -> Subject:
    return Subject(uid, gid, groups)


# The default, and whom no rule restrains.


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(("uid", "allowed"), [(0, True), (OWN, True), (ALICE, False)])
def test_the_default(verb: str, uid: int, allowed: bool) -> None:
    decision = Policy(OWN).decide(verb, "tcp://127.0.0.1:80" if verb == "bind" else "n", who(uid))
    assert decision.allowed is (allowed or verb == "ping")
    assert Policy(OWN).trusts(who(uid)) is allowed


@pytest.mark.parametrize(("own", "words"), [(0, "only root"), (7, "only uid 7 and root")])
def test_the_default_in_words(own: int, words: str) -> None:
    assert Policy(own).decide("fetch", "n", who(ALICE)).rule == f"the default: {words}"


def test_the_overflow_uid_is_nobody_in_particular() -> None:
    """Every user without a number in the server's user namespace has it."""
    stranger = Subject(65534, 65534, is_overflow=True)
    assert not Policy(65534).trusts(stranger)
    assert not Policy(65534).decide("shutdown", "", stranger).allowed
    assert not Policy(OWN).decide_removal(65534, stranger).allowed
    assert Policy(65534).trusts(Subject(65534, 65534))


def test_who_may_be_in_a_group_is_not_let_past_a_rule_against_it() -> None:
    rule = '[[rule]]\neffect = "{}"\nverbs = ["fetch"]\n'
    of_web = 'groups = ["web"]\n'
    denied = policy(rule.format("deny") + of_web + rule.format("allow"))
    allowed = policy(rule.format("allow") + of_web)
    certain, uncertain = Subject(ALICE, 100), Subject(ALICE, 100, all_groups=False)
    assert denied.decide("fetch", "n", certain).allowed
    assert not denied.decide("fetch", "n", uncertain).allowed
    assert not allowed.decide("fetch", "n", uncertain).allowed


def test_a_rule_cannot_restrain_root_or_the_servers_own_uid() -> None:
    strict = policy('[[rule]]\neffect = "deny"\nverbs = ["*"]\n')
    assert strict.decide("shutdown", "", who(0)).allowed
    assert strict.decide("shutdown", "", who(OWN)).allowed
    assert not strict.decide("shutdown", "", who(ALICE)).allowed


def test_a_verb_that_is_none() -> None:
    decision = Policy(OWN).decide("fech", "n", who(0))
    assert not decision.allowed
    assert "no verb 'fech'" in decision.rule


@pytest.mark.parametrize(
    ("registrant", "uid", "allowed"),
    [(ALICE, ALICE, True), (ALICE, BOB, False), (0, ALICE, False), (ALICE, OWN, True)],
)
def test_the_registrant_rule(registrant: int, uid: int, allowed: bool) -> None:
    decision = Policy(OWN).decide_removal(registrant, who(uid))
    assert decision.allowed is allowed
    assert allowed or f"uid {registrant}" in decision.rule


# Rules, case by case.

TABLE = """
[[rule]]
comment = "no secrets"
effect = "deny"
verbs = ["*"]
names = ["secret/*"]

[[rule]]
comment = "alice serves the web"
effect = "allow"
users = ["alice"]
verbs = ["bind", "register", "fetch", "take", "unregister"]
names = ["web/*", "log"]
addresses = ["tcp://localhost:80", "tcp://[::1]:*"]

[[rule]]
comment = "the ops look"
effect = "allow"
groups = ["ops"]
verbs = ["list", "watch", "stats"]

[[rule]]
effect = "allow"
groups = ["ops", 55]
users = [1001]
verbs = ["fetch", "info"]
"""


@pytest.mark.parametrize(
    ("verb", "name", "subject", "allowed", "rule"),
    [
        ("fetch", "web/http", who(ALICE), True, "rule 2 (alice serves the web)"),
        ("fetch", "web/a/b", who(ALICE), True, "rule 2"),
        ("fetch", "web", who(ALICE), False, "the default"),
        ("fetch", "log", who(ALICE), True, "rule 2"),
        ("fetch", "secret/key", who(ALICE), False, "rule 1 (no secrets)"),
        ("fetch", "secret/key", who(BOB), False, "rule 1"),
        ("info", "web/http", who(ALICE), False, "the default"),
        ("bind", "tcp://127.0.0.1:80", who(ALICE), True, "rule 2"),
        ("bind", "tcp://localhost:80", who(ALICE), True, "rule 2"),
        ("bind", "tcp://127.0.0.1:8080", who(ALICE), False, "the default"),
        ("bind", "udp://127.0.0.1:80", who(ALICE), False, "the default"),
        ("bind", "tcp://[::1]:443", who(ALICE), True, "rule 2"),
        ("bind", "tcp://[::2]:443", who(ALICE), False, "the default"),
        ("bind", "tcp://*:443", who(ALICE), False, "the default"),
        ("bind", "unix:///run/web/a.sock", who(ALICE), False, "passes for uid"),
        ("bind", "unix:@web", who(ALICE), False, "passes for uid"),
        ("bind", "unix:///run/web/a.sock", who(OWN), True, "the server's own uid"),
        ("bind", "unix:///run/web/../x", who(ALICE), False, "a path without"),
        ("bind", "tcp://127.1:80", who(ALICE), False, "not a numeric address"),
        ("bind", "web/http", who(ALICE), False, "write tcp://"),
        ("bind", "tcp://127.0.0.1:80", who(BOB), False, "the default"),
        ("list", "", who(ALICE), False, "the default"),
        ("list", "", who(BOB), False, "the default"),
        ("list", "", who(BOB, 44), True, "rule 3 (the ops look)"),
        ("watch", "", who(BOB, 1, 2, 44), True, "rule 3"),
        ("shutdown", "", who(BOB, 44), False, "the default"),
        ("fetch", "anything", who(BOB), True, "rule 4"),
        ("fetch", "anything", who(7, 55), True, "rule 4"),
        ("info", "anything", who(7, 7, 44), True, "rule 4"),
        ("fetch", "anything", who(7, 33), False, f"no rule of {FILE} matches"),
        ("take", "anything", who(BOB), False, "the default"),
        ("ping", "", who(7), True, "may ping"),
    ],
)
def test_the_file(verb: str, name: str, subject: Subject, allowed: bool, rule: str) -> None:
    decision = policy(TABLE).decide(verb, name, subject)
    assert decision.allowed is allowed, decision
    assert rule in decision.rule


@pytest.mark.parametrize("verb", sorted(SERVER_VERBS))
def test_a_pattern_never_reaches_a_verb_of_the_server(verb: str) -> None:
    for restriction in ('names = ["*"]', 'addresses = ["*"]'):
        text = f'[[rule]]\neffect = "allow"\nverbs = ["*"]\n{restriction}\n'
        assert not policy(text).decide(verb, "", who(ALICE)).allowed


def test_names_say_nothing_of_addresses_and_the_other_way_round() -> None:
    names = policy('[[rule]]\neffect = "allow"\nverbs = ["*"]\nnames = ["*"]\n')
    assert names.decide("fetch", "n", who(ALICE)).allowed
    assert not names.decide("bind", "tcp://127.0.0.1:80", who(ALICE)).allowed
    addresses = policy('[[rule]]\neffect = "allow"\nverbs = ["*"]\naddresses = ["*"]\n')
    assert not addresses.decide("fetch", "n", who(ALICE)).allowed
    assert addresses.decide("bind", "tcp://127.0.0.1:80", who(ALICE)).allowed


# The model: the same file, read the plainest way.

NAMES = ["a", "b", "web/a", "web/b", "log"]
PATTERNS = ["*", "a", "web/*", "?", "[ab]", "*b", "nothing"]
ADDRESSES = ["tcp://127.0.0.1:80", "tcp://[::1]:80", "udp://0.0.0.0:53", "unix:///run/a"]
ADDRESS_PATTERNS = ["*", "tcp://*", "tcp://*:80", *ADDRESSES[:3]]
NAMED = [v for v in VERBS if v not in SERVER_VERBS and v not in ("bind", "ping")]


def some(of: list[Any]) -> st.SearchStrategy[Any]:
    return st.lists(st.sampled_from(of), min_size=1, max_size=3, unique=True)


@st.composite
def rules(draw: st.DrawFn) -> dict[str, Any]:
    rule: dict[str, Any] = {"effect": draw(st.sampled_from(["allow", "deny"]))}
    for key, values in (
        ("users", ["alice", 1001, 7]),
        ("groups", ["web", 44]),
        ("names", PATTERNS),
        ("addresses", ADDRESS_PATTERNS),
    ):
        if draw(st.booleans()):
            rule[key] = draw(some(values))
    verbs = []
    if "names" in rule or "addresses" not in rule:
        verbs += NAMED
    if "addresses" in rule or "names" not in rule:
        verbs += ["bind"]
    if "names" not in rule and "addresses" not in rule:
        verbs += sorted(SERVER_VERBS)
    rule["verbs"] = draw(st.just(["*"]) | some(verbs))
    return rule


def toml(file: list[dict[str, Any]]) -> str:
    # A list of strings and numbers is the same in JSON and in TOML.
    return "\n".join(
        "[[rule]]\n" + "\n".join(f"{key} = {json.dumps(value)}" for key, value in rule.items())
        for rule in file
    )


def model(file: list[dict[str, Any]], verb: str, what: str, subject: Subject) -> bool:
    """What the file means, slowly."""
    if subject.uid in (0, OWN) or verb == "ping":
        return True
    if verb == "bind" and what.startswith("unix:"):
        return False
    for rule in file:
        uids = [USERS.get(u, u) for u in rule.get("users", [])]
        gids = [GROUPS.get(g, g) for g in rule.get("groups", [])]
        nobody_named = "users" not in rule and "groups" not in rule
        mine = {subject.gid, *subject.groups}
        if not (nobody_named or subject.uid in uids or mine & set(gids)):
            continue
        if rule["verbs"] != ["*"] and verb not in rule["verbs"]:
            continue
        restricted = "names" in rule or "addresses" in rule
        if restricted:
            if verb in SERVER_VERBS:
                continue
            if verb == "bind":
                # No character classes in an address: [::1] is one thing.
                patterns = [p.replace("[", "[[]") for p in rule.get("addresses", [])]
            else:
                patterns = rule.get("names", [])
            if not any(fnmatch.fnmatchcase(what, pattern) for pattern in patterns):
                continue
        return bool(rule["effect"] == "allow")
    return False


@given(
    st.lists(rules(), max_size=5),
    st.sampled_from(VERBS),
    st.sampled_from(NAMES),
    st.sampled_from(ADDRESSES),
    st.sampled_from([0, OWN, ALICE, BOB, 7, 8]),
    st.sampled_from([33, 44, 100]),
    st.lists(st.sampled_from([33, 44, 101]), max_size=2),
)
def test_the_model_agrees(
    file: list[dict[str, Any]],
    verb: str,
    name: str,
    address: str,
    uid: int,
    gid: int,
    groups: list[int],
) -> None:
    what = address if verb == "bind" else "" if verb in SERVER_VERBS else name
    subject = Subject(uid, gid, tuple(groups))
    decision = policy(toml(file)).decide(verb, what, subject)
    assert decision.allowed is model(file, verb, what, subject), (toml(file), decision)


@pytest.mark.parametrize(
    ("module", "libraries"), [("policy", set()), ("policy_file", {"re", "tomllib", "msgspec"})]
)
def test_it_knows_no_socket_no_clock_no_os(module: str, libraries: set[str]) -> None:
    tree = ast.parse(Path(core.__path__[0], f"{module}.py").read_text())
    imported = {n.names[0].name for n in ast.walk(tree) if isinstance(n, ast.Import)}
    assert imported == libraries
