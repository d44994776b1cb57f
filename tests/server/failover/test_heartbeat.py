"""When a keeper asks its server for a sign of life, and when it gives it up."""

from __future__ import annotations

import pytest

from fdshare.server.failover.heartbeat import Heartbeat


def ticks(heartbeat: Heartbeat, answers: str) -> list[bool]:
    """Lives through a question for each letter of *answers*; a "y" is answered. What `ask` said."""
    asked = []
    for answer in answers:
        assert heartbeat.due is not None
        asked.append(heartbeat.ask(heartbeat.due))
        if answer == "y":
            heartbeat.answered()
    return asked


@pytest.fixture
def heartbeat() -> Heartbeat:
    made = Heartbeat(6.0)
    made.begin(100.0)
    return made


def test_it_asks_in_time(heartbeat: Heartbeat) -> None:
    assert heartbeat.due == 101.0
    assert not heartbeat.ask(100.9)
    assert heartbeat.ask(101.0)
    assert heartbeat.due == 102.0


def test_a_server_that_answers_is_well(heartbeat: Heartbeat) -> None:
    assert all(ticks(heartbeat, "y" * 20))
    assert heartbeat.well
    assert not heartbeat.hangs


def test_one_that_is_late_is_given_time(heartbeat: Heartbeat) -> None:
    assert all(ticks(heartbeat, "nnnny" * 4))
    assert heartbeat.well


def test_one_that_is_silent_hangs_after_its_time(heartbeat: Heartbeat) -> None:
    assert ticks(heartbeat, "n") == [True]
    assert heartbeat.well
    assert ticks(heartbeat, "n") == [True]
    assert not heartbeat.well
    assert ticks(heartbeat, "nnn") == [True] * 3
    assert not heartbeat.hangs
    assert ticks(heartbeat, "n") == [False]
    assert heartbeat.hangs
    assert heartbeat.due == 107.0  # the sixth question would have been 6 seconds after the start


def test_time_that_nobody_had_is_no_silence(heartbeat: Heartbeat) -> None:
    assert heartbeat.ask(1e6)
    assert heartbeat.well


@pytest.mark.parametrize("again", [Heartbeat.end, lambda beat: beat.begin(0.0)])
def test_another_server_is_judged_anew(heartbeat: Heartbeat, again: object) -> None:
    ticks(heartbeat, "nnnnnn")
    again(heartbeat)  # type: ignore[operator]
    assert heartbeat.well
    assert not heartbeat.hangs


def test_nobody_is_asked_where_there_is_no_server(heartbeat: Heartbeat) -> None:
    heartbeat.end()
    assert heartbeat.due is None
    assert not heartbeat.ask(1e6)
