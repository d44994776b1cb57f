"""What the keeper has still to close, as the server counts it."""

from __future__ import annotations

import pytest

from fdshare.server.loop import keeper_closes
from fdshare.server.loop.closing import OURS
from fdshare.server.loop.keeper_closes import KeeperCloses


def test_what_is_removed_counts_until_the_keeper_has_closed_it() -> None:
    closes = KeeperCloses()
    closes.add([1, 2, 1, OURS])
    assert closes.open == {1: 2, 2: 1}
    closes.closed({1: 1, 2: 1})
    assert closes.open == {1: 1}
    assert (closes.of(1), closes.of(2), closes.of(OURS)) == (1, 0, 0)
    closes.closed({1: 5, 3: 1})  # what the keeper closed for a server before this one
    assert closes.open == {}


def test_a_close_hangs_if_none_is_reported_for_some_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(keeper_closes.time, "monotonic", lambda: now)
    closes = KeeperCloses()
    closes.add([1, 1])
    assert not closes.hangs(1)
    now += 1
    closes.add([1])
    assert closes.hangs(1)
    assert closes.hanging() == {1: 3}
    closes.closed({1: 1})  # it goes on
    assert not closes.hangs(1)
    assert closes.hanging() == {}
    now += 1
    closes.closed({1: 2})
    assert not closes.hangs(1)


def test_a_dead_keeper_has_nothing_to_close() -> None:
    closes = KeeperCloses()
    closes.add([1])
    closes.clear()
    assert closes.open == {}
    assert not closes.hangs(1)
