"""watch_state: the state of a watch, against a model."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fdshare.client import watch_state as module
from fdshare.client.watch_state import Snapshot, WatchState
from fdshare.protocol import messages as m
from fdshare.protocol.names import matcher

NAMES = ["a", "b", "c", "x/a", "x/b"]


class WatchedTable(RuleBasedStateMachine):
    """A server with one table and one watch of it, whose connection and patience may break."""

    def __init__(self) -> None:
        super().__init__()
        self.pattern = "x/*"
        self.matches = matcher(self.pattern)
        self.table: dict[str, int] = {}
        self.serial = 0
        self.watching = WatchState(self.pattern)
        self.answered = False  # the watch has its snapshot
        self.known = 0  # the serial of the last snapshot
        self.seen = 0  # the serial of what was drawn last

    def change(self, event: m.EventKind, name: str, old: str = "") -> None:
        self.serial += 1
        if self.answered:
            self.watching.event(m.Event(self.serial, event, name, self.serial, old))

    @rule(name=st.sampled_from(NAMES))
    def register(self, name: str) -> None:
        self.change("replaced" if name in self.table else "registered", name)
        self.table[name] = self.serial

    @rule(name=st.sampled_from(NAMES), event=st.sampled_from(["taken", "unregistered", "expired"]))
    def remove(self, name: str, event: m.EventKind) -> None:
        if self.table.pop(name, None) is not None:
            self.change(event, name)

    @rule(old=st.sampled_from(NAMES), new=st.sampled_from(NAMES))
    def rename(self, old: str, new: str) -> None:
        if old in self.table and new not in self.table:
            del self.table[old]
            self.change("registered", new, old)
            self.table[new] = self.serial

    @rule(cut=st.integers(0, 5))
    def answer(self, cut: int) -> None:
        """The snapshot, in two parts."""
        visible = [(n, g) for n, g in self.table.items() if self.matches(n)]
        self.watching.snapshot(m.SnapshotPart(self.serial, dict(visible[:cut]), True))
        self.watching.snapshot(m.SnapshotPart(self.serial, dict(visible[cut:]), False))
        self.answered, self.known = True, self.serial

    @rule()
    def break_off(self) -> None:
        """The connection ends, in the middle of an answer."""
        self.watching.snapshot(m.SnapshotPart(self.serial, {"x/ghost": 1}, True))
        self.watching.lost()
        self.answered = False

    @rule()
    def overflow(self) -> None:
        self.watching.overflowed()
        self.answered = False

    @precondition(lambda self: self.answered)
    @rule()
    def old_events_do_not_count(self) -> None:
        assert not self.watching.event(m.Event(self.known, "registered", "x/old", 1))

    @rule(most=st.integers(1, 4))
    def draw(self, most: int) -> None:
        for _ in range(most):
            change = self.watching.draw()
            if change is None:
                return
            assert change.serial > self.seen or isinstance(change, Snapshot)
            self.seen = change.serial
            if isinstance(change, m.Event):
                assert self.matches(change.name)

    @invariant()
    def converges(self) -> None:
        """Whoever draws all there is knows what is held."""
        if self.answered and not self.watching._queue:
            held = {n: g for n, g in self.table.items() if self.matches(n)}
            assert self.watching.held == held

    def teardown(self) -> None:
        self.answer(2)
        while self.watching.draw() is not None:
            pass
        self.converges()


class WatchedTableWithLittleRoom(WatchedTable):
    """The same, where what nobody draws is folded soon."""

    def __init__(self) -> None:
        super().__init__()
        self._kept = module._KEPT
        module._KEPT = 3  # type: ignore[misc]

    def teardown(self) -> None:
        super().teardown()
        module._KEPT = self._kept  # type: ignore[misc]


TestWatchedTable = WatchedTable.TestCase
TestWatchedTableWithLittleRoom = WatchedTableWithLittleRoom.TestCase
_SETTINGS = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestWatchedTable.settings = TestWatchedTableWithLittleRoom.settings = _SETTINGS


@given(st.integers(1, 20))
def test_what_is_not_drawn_is_folded(extra: int) -> None:
    watching = WatchState("*")
    watching.snapshot(m.SnapshotPart(0, {}))
    for serial in range(1, module._KEPT + extra + 1):
        watching.event(m.Event(serial, "registered", f"n{serial}", serial))
    snapshot = watching.draw()
    assert isinstance(snapshot, Snapshot)
    assert snapshot.reason == "overflow"
    assert len(snapshot.entries) == module._KEPT
    while watching.draw() is not None:
        pass
    assert len(watching.held) == module._KEPT + extra


def test_a_server_that_was_lost_is_told_of_though_it_is_folded() -> None:
    """Its successor may have serials of its own."""
    watching = WatchState("*")
    watching.snapshot(m.SnapshotPart(0, {}))
    assert watching.draw() is not None
    watching.lost()
    watching.snapshot(m.SnapshotPart(7, {}))
    for serial in range(8, 2 * module._KEPT + 9):  # folded twice
        watching.event(m.Event(serial, "registered", "x", serial))
    snapshot = watching.draw()
    assert isinstance(snapshot, Snapshot)
    assert snapshot.reason == "reconnect"


def test_a_server_that_was_lost_after_an_overflow_is_told_of() -> None:
    watching = WatchState("*")
    watching.snapshot(m.SnapshotPart(1, {}))
    watching.overflowed()
    watching.lost()
    watching.snapshot(m.SnapshotPart(1, {}))
    reasons = [snapshot.reason for snapshot in watching._queue if isinstance(snapshot, Snapshot)]
    assert reasons == ["start", "reconnect"]
