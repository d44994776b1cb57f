"""Names for a service manager, short and used again."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from fdshare.activation import check_fdname
from fdshare.server.failover.labels import BUDGET, MOST, TABLE, Labels, is_label, new_prefix, price


def test_they_are_short_and_differ() -> None:
    labels = Labels(".abc")
    taken = [labels.take() for _ in range(5000)]
    assert taken[:3] == [".abc0", ".abc1", ".abc2"]
    assert taken[61:63] == [".abcZ", ".abc10"]
    assert len(set(taken)) == 5000
    assert all(map(is_label, taken))
    assert max(map(len, taken)) == 7


def test_the_shortest_that_is_free_comes_next() -> None:
    labels = Labels(".abc")
    taken = [labels.take() for _ in range(100)]
    for at in (70, 5, 99):
        labels.give_back(taken[at])
    assert [labels.take() for _ in range(4)] == [taken[5], taken[70], taken[99], ".abc1C"]


def test_what_is_used_is_not_free() -> None:
    labels = Labels(".abc", [".abc0", ".abc2", ".abc10", ".abc2"])
    assert [labels.take() for _ in range(3)] == [".abc1", ".abc3", ".abc4"]


@pytest.mark.parametrize("name", [TABLE, "fdshare", "stored", "unknown", ".abc", "abc12", ".ab:1"])
def test_other_names_are_no_labels(name: str) -> None:
    assert not is_label(name)


def test_each_table_has_its_own() -> None:
    made = {new_prefix() for _ in range(100)}
    assert len(made) > 90
    for prefix in made:
        assert is_label(check_fdname(prefix + "0"))


def test_as_many_as_are_allowed_can_be_passed() -> None:
    labels = Labels(new_prefix())
    names = [labels.take() for _ in range(MOST)]
    assert sum(map(price, names)) <= BUDGET < sum(map(price, [*names, labels.take()]))
    # A socket unit's own name, and systemd's greatest default.
    environment = {"LISTEN_FDNAMES": ":".join(["x" * 255, TABLE, *names])}
    subprocess.run([sys.executable, "-c", ""], env={**os.environ, **environment}, check=True)
    assert MOST > 16384
