"""settings: data that goes to another process, and the policy that they name."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from fdshare.errors import EndpointError, PolicyError
from fdshare.server.core.policy import Subject
from fdshare.server.settings import MAX_POLICY, Settings, policy_of, read_policy

RULE = '[[rule]]\neffect = "{}"\nverbs = ["fetch"]\n'
STRANGER = Subject(12345, 12345)


@pytest.fixture
def settings(folder: Path) -> Settings:
    """Those of a server whose policy lets everybody fetch."""
    (folder / "policy").write_text(RULE.format("allow"))
    return Settings(path="/path", policy=str(folder / "policy"))


def may_fetch(settings: Settings) -> bool:
    return policy_of(settings).decide("fetch", "x", STRANGER).allowed


def test_they_go_to_another_process_whole() -> None:
    settings = Settings(
        path="@x",
        mode=0o640,
        limits={"max_names": 5, "lease_timeout": 0.5},
        authkey=b"\0\xff",
        policy_text=b"\xff",
        log_format="json",
    )
    data = msgspec.msgpack.encode(settings)
    assert msgspec.msgpack.decode(data, type=Settings) == settings


def test_what_cannot_go_there_is_refused() -> None:
    """At the start, and not when the server is to run new code."""
    path = os.fsdecode(b"/caf\xe9")
    with pytest.raises(EndpointError, match="not UTF-8"):
        Settings(path=path)
    with pytest.raises(PolicyError, match="not UTF-8"):
        Settings(path="/path", policy=path)
    settings = Settings(path="/caf\xe9")
    settings.path = path
    with pytest.raises(EndpointError, match="not UTF-8"):
        settings.refuse_what_cannot_be_sent()


def test_without_a_policy_the_owner_and_root_may_all() -> None:
    policy, text = read_policy(Settings(path="/path"))
    assert text is None
    assert policy.trusts(Subject(os.geteuid(), 0))
    assert not policy.trusts(Subject(os.geteuid() + 1, 0))
    assert not may_fetch(Settings(path="/path"))


def test_what_was_read_is_decided_by_whatever_the_file_has_become(
    settings: Settings, folder: Path
) -> None:
    settings.policy_text = read_policy(settings)[1]
    assert settings.policy_text == RULE.format("allow").encode()
    (folder / "policy").write_text(RULE.format("deny"))
    assert may_fetch(settings)
    settings.policy_text = None  # nothing was read yet
    assert not may_fetch(settings)


def test_a_file_that_cannot_be_read(settings: Settings, folder: Path) -> None:
    (folder / "policy").unlink()
    with pytest.raises(PolicyError, match="No such file"):
        read_policy(settings)
    (folder / "policy").mkdir()
    with pytest.raises(PolicyError, match="directory"):
        read_policy(settings)


def test_a_file_that_is_too_long_for_a_message_to_the_keeper(
    settings: Settings, folder: Path
) -> None:
    rule = RULE.format("allow")
    (folder / "policy").write_text(rule + "#" * (MAX_POLICY - len(rule)))
    read_policy(settings)
    (folder / "policy").write_text(rule + "#" * (MAX_POLICY + 1 - len(rule)))
    with pytest.raises(PolicyError, match=f"more than {MAX_POLICY} bytes"):
        read_policy(settings)


def test_users_are_looked_up_by_name(settings: Settings, folder: Path) -> None:
    (folder / "policy").write_text(RULE.format("allow") + 'users = ["nobody"]\n')
    assert read_policy(settings)[0].decide("fetch", "x", Subject(65534, 1)).allowed
    assert not read_policy(settings)[0].decide("fetch", "x", STRANGER).allowed
    (folder / "policy").write_text(RULE.format("allow") + 'users = ["nobody of this name"]\n')
    (warning,) = read_policy(settings)[0].warnings
    assert "nobody of this name" in warning
