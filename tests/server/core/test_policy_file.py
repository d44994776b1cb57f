"""policy_file: what is wrong with a file, and where; and that the documentation's are right."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdshare.errors import PolicyError
from fdshare.server.core.policy import Policy, Subject
from fdshare.server.core.policy_file import policy_from_toml

OWN, ALICE, BOB = 500, 1000, 1001
USERS = {"alice": ALICE, "bob": BOB}
GROUPS = {"web": 33, "ops": 44}
FILE = "/etc/fdshare/policy.toml"


def policy(text: str) -> Policy:
    return policy_from_toml(
        text.encode(), file=FILE, own_uid=OWN, uid_of=USERS.__getitem__, gid_of=GROUPS.__getitem__
    )


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
        (RULE + "users = [-1]\n", "rule 1 (line 1), users[0]", "-1 is no id"),
        (RULE + "users = [4294967295]\n", "rule 1 (line 1), users[0]", "is no id"),
        (RULE + "users = []\n", "rule 1 (line 1), users", "empty list"),
        (RULE + "names = []\n", "rule 1 (line 1), names", "empty list"),
        (RULE + "names = ['']\n", "rule 1 (line 1), names[0]", "no name is empty"),
        (RULE.replace("fetch", "fech"), "rule 1 (line 1), verbs[0]", "no verb 'fech'"),
        (RULE.replace("fetch", "rename"), "rule 1 (line 1), verbs[0]", "a rename is"),
        (RULE.replace("fetch", "ping"), "rule 1 (line 1), verbs[0]", "every client may ping"),
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
            RULE.replace("fetch", "bind") + "addresses = ['unix:///run/*']\n",
            "rule 1 (line 1), addresses[0]",
            "root and the server's own uid",
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


def test_who_is_not_known_is_warned_of_and_nobody() -> None:
    text = RULE + "users = ['eve', 'alice']\ngroups = ['wheel']\n" + RULE + "users = ['eve']\n"
    made = policy(text)
    assert made.warnings == (
        "rule 1 (line 1), users[0]: there is no user 'eve' here",
        "rule 1 (line 1), groups[0]: there is no group 'wheel' here",
        "rule 2 (line 6), users[0]: there is no user 'eve' here",
    )
    assert made.decide("fetch", "n", Subject(ALICE, 100)).rule == "rule 1"
    # A rule that is about nobody else is about nobody.
    assert not made.decide("fetch", "n", Subject(ALICE + 1, 101)).allowed
    assert policy(RULE).warnings == ()


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
    assert not made.decide("fetch", "n", Subject(ALICE, 100)).allowed


def test_an_empty_file_is_the_default() -> None:
    assert (
        policy("# nothing\n")
        .decide("fetch", "n", Subject(ALICE, 100))
        .rule.startswith("the default")
    )


def test_the_examples_of_the_documentation_are_read() -> None:
    text = Path(__file__).parents[3].joinpath("docs/policy.md").read_text()
    examples = [part.split("```")[0] for part in text.split("```toml\n")[1:]]
    assert len(examples) >= 2
    for example in examples:
        made = policy_from_toml(
            example.encode(), file=FILE, own_uid=OWN, uid_of=lambda n: 1000, gid_of=lambda n: 33
        )
        assert made.rules


def test_an_address_is_matched_without_going_back() -> None:
    """Else this would take years: each star could stand for as much of it as the others leave."""
    stars = "*1" * 30
    text = f"{RULE.replace('fetch', 'bind')}addresses = ['tcp://{stars}*:80']\n"
    rules = policy(text)
    long = "tcp://[" + ":".join(["1111"] * 8) + "]"
    assert not rules.decide("bind", long + ":81", Subject(1000, 1000)).allowed
    assert rules.decide("bind", long + ":80", Subject(1000, 1000)).allowed
