"""Subscriptions, against the plain way: every pattern tried on every name."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdshare.protocol.names import matcher
from fdshare.protocol.subscriptions import Subscriptions

PATTERNS = st.sampled_from(["*", "a", "b", "a/b", "a/*", "?", "[ab]", "*b", "a*b", ""])
NAMES = st.sampled_from(["a", "b", "c", "a/b", "a/c", "ab", "[ab]"])


@given(st.lists(st.tuples(PATTERNS, st.integers(0, 3))), st.lists(NAMES, min_size=1, max_size=2))
def test_the_subscribers_of_a_name_are_those_whose_pattern_matches(
    added: list[tuple[str, int]], names: list[str]
) -> None:
    subscriptions: Subscriptions[int] = Subscriptions()
    for pattern, subscriber in added:
        subscriptions.add(pattern, subscriber)
    assert subscriptions.count == len(added)
    while added:
        wanted = {s for pattern, s in added if any(map(matcher(pattern), names))}
        found = subscriptions.of(*names)
        assert set(found) == wanted
        assert len(found) == len(wanted)
        assert sorted(subscriptions.subscribers()) == sorted({s for _, s in added})
        subscriptions.remove(*added.pop())
    assert subscriptions.count == 0
    assert subscriptions.of(*names) == []


def test_what_was_not_added_cannot_be_removed() -> None:
    subscriptions: Subscriptions[int] = Subscriptions()
    for pattern in ("plain", "wild*"):
        with pytest.raises(KeyError):
            subscriptions.remove(pattern, 1)
