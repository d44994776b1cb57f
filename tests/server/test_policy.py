"""policy: the default, the file, its faults, and a small model that must agree in every case."""

from __future__ import annotations

import ast
import fnmatch
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdshare import server
from fdshare.errors import PolicyError
from fdshare.server.policy import SERVER_VERBS, VERBS, Policy, Subject
from fdshare.server.policyfile import policy_from_toml

OWN, ALICE, BOB = 500, 1000, 1001
USERS = {"alice": ALICE, "bob": BOB}
GROUPS = {"web": 33, "ops": 44}
FILE = "/etc/fdshare/policy.toml"


def policy(text: str) -> Policy:
    return policy_from_toml(
        text.encode(), file=FILE, own_uid=OWN, uid_of=USERS.__getitem__, gid_of=GROUPS.__getitem__
    )


def who(uid: int, gid: int = 100, *groups: int) -> Subject:
    return Subject(uid, gid, groups)


# The default, and whom no rule restrains.


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(("uid", "allowed"), [(0, True), (OWN, True), (ALICE, False)])
def test_the_default(verb: str, uid: int, allowed: bool) -> None:
    decision = Policy(OWN).decide(verb, "tcp://127.0.0.1:80" if verb == "bind" else "n", who(uid))
    assert decision.allowed is (allowed or verb == "ping")
    assert Policy(OWN).trusts(uid) is allowed


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


# The file, case by case.

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
addresses = ["tcp://localhost:80", "tcp://[::1]:*", "unix:///run/web/*"]

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
        ("bind", "unix:///run/web/a.sock", who(ALICE), True, "rule 2"),
        ("bind", "unix:///run/web/../x", who(ALICE), False, "a path without"),
        ("bind", "tcp://127.1:80", who(ALICE), False, "no numeric address"),
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


def test_an_empty_file_is_the_default() -> None:
    assert policy("# nothing\n").decide("fetch", "n", who(ALICE)).rule.startswith("the default")


# Faults: file, place, reason.

RULE = '[[rule]]\neffect = "allow"\nverbs = ["fetch"]\n'


@pytest.mark.parametrize(
    ("text", "where", "reason"),
    [
        ("[[rule]\n", "line 1", "Expected"),
        (RULE + "\nusers = [\n", "line 6", ""),
        ("a = 1\na = 2\n", "line 2", ""),
        ("a = " + "[" * 50_000, "the file", "nested"),
        ("rules = []\n", "the file", "unknown field `rules`"),
        ("rule = 3\n", "rule", "Expected `array`"),
        ("rule = [3]\n", "rule 1", "Expected `object`"),
        ('[[rule]]\neffect = "allow"\n', "rule 1 (line 1)", "missing required field `verbs`"),
        ('[[rule]]\nverbs = ["fetch"]\n', "rule 1 (line 1)", "required field `effect`"),
        ('\n[[rule]]\neffect = "alow"\nverbs = ["fetch"]\n', "rule 1 (line 2), effect", "alow"),
        (RULE + RULE + "name = ['a']\n", "rule 2 (line 4)", "unknown field `name`"),
        (RULE + "users = [1.5]\n", "rule 1 (line 1), users[0]", "got `float`"),
        (RULE + "users = [true]\n", "rule 1 (line 1), users[0]", "got `bool`"),
        (RULE + "users = ['alice', 'eve']\n", "rule 1 (line 1), users[1]", "no user 'eve'"),
        (RULE + "groups = ['wheel']\n", "rule 1 (line 1), groups[0]", "no group 'wheel'"),
        (RULE + "users = [-1]\n", "rule 1 (line 1), users[0]", "-1 is no id"),
        (RULE + "users = [4294967295]\n", "rule 1 (line 1), users[0]", "is no id"),
        (RULE + "users = []\n", "rule 1 (line 1), users", "empty list"),
        (RULE + "names = []\n", "rule 1 (line 1), names", "empty list"),
        (RULE + "names = ['']\n", "rule 1 (line 1), names[0]", "no name is empty"),
        (RULE.replace("fetch", "fech"), "rule 1 (line 1), verbs[0]", "no verb 'fech'"),
        (RULE.replace("fetch", "rename"), "rule 1 (line 1), verbs[0]", "a rename is"),
        (RULE.replace("fetch", "ping"), "rule 1 (line 1), verbs[0]", "whoever may connect"),
        (RULE.replace('"fetch"', '"fetch", "*"'), "rule 1 (line 1), verbs[1]", "'*' alone"),
        (RULE.replace('"fetch"', ""), "rule 1 (line 1), verbs", "empty list"),
        (RULE.replace("fetch", "list") + "names = ['a']\n", "verbs[0]", "without them"),
        (RULE.replace("fetch", "bind") + "names = ['a']\n", "verbs[0]", "needs addresses"),
        (RULE + "addresses = ['*']\n", "verbs[0]", "needs names"),
        (
            RULE.replace("fetch", "bind") + "addresses = ['tcp://example.org:80']\n",
            "rule 1 (line 1), addresses[0]",
            "not looked up",
        ),
        (
            RULE.replace("fetch", "bind") + "addresses = ['*:80']\n",
            "rule 1 (line 1), addresses[0]",
            "write tcp://HOST:PORT",
        ),
        ("rule = [{effect='allow', verbs=['x']}]\n", "rule 1, verbs[0]", "no verb 'x'"),
    ],
)
def test_a_broken_file(text: str, where: str, reason: str) -> None:
    with pytest.raises(PolicyError) as caught:
        policy(text)
    error = caught.value
    assert error.file == FILE
    assert where in error.where
    assert reason in error.reason
    assert str(error).startswith(f"{FILE}: {error.where}: ")


def test_a_file_that_is_not_utf8() -> None:
    with pytest.raises(PolicyError) as caught:
        policy_from_toml(
            b"# a\n# \xff\n", file=FILE, own_uid=OWN, uid_of=USERS.get, gid_of=GROUPS.get
        )  # type: ignore[arg-type]
    assert caught.value.where == "line 2"


@given(st.binary(max_size=80) | st.text("[]rule=\"'{}\n,*verbs 1.", max_size=60).map(str.encode))
def test_no_file_raises_anything_else(text: bytes) -> None:
    try:
        made = policy_from_toml(
            text, file=FILE, own_uid=OWN, uid_of=USERS.__getitem__, gid_of=GROUPS.__getitem__
        )
    except PolicyError:
        return
    assert not made.decide("fetch", "n", who(ALICE)).allowed


# The model: the same file, read the plainest way.

NAMES = ["a", "b", "web/a", "web/b", "log"]
PATTERNS = ["*", "a", "web/*", "?", "[ab]", "*b", "nothing"]
ADDRESSES = ["tcp://127.0.0.1:80", "tcp://[::1]:80", "udp://0.0.0.0:53", "unix:///run/a"]
ADDRESS_PATTERNS = ["*", "tcp://*", "tcp://*:80", "unix:///run/*", *ADDRESSES]
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


# The words about it.


def test_the_examples_of_the_documentation_are_read() -> None:
    text = Path(__file__).parents[2].joinpath("docs/policy.md").read_text()
    examples = [part.split("```")[0] for part in text.split("```toml\n")[1:]]
    assert len(examples) >= 2
    for example in examples:
        made = policy_from_toml(
            example.encode(), file=FILE, own_uid=OWN, uid_of=lambda n: 1000, gid_of=lambda n: 33
        )
        assert made.rules


@pytest.mark.parametrize(
    ("module", "libraries"), [("policy", set()), ("policyfile", {"re", "tomllib", "msgspec"})]
)
def test_it_knows_no_socket_no_clock_no_os(module: str, libraries: set[str]) -> None:
    tree = ast.parse(Path(server.__path__[0], f"{module}.py").read_text())
    imported = {n.names[0].name for n in ast.walk(tree) if isinstance(n, ast.Import)}
    assert imported == libraries
