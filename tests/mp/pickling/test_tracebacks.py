"""Tracebacks there and back."""

from __future__ import annotations

import pickle
import sys
import traceback
from types import TracebackType
from typing import Any

import pytest

from fdshare.mp.pickling.tracebacks import reduce_traceback


class Carried:
    def __init__(self, carried: TracebackType) -> None:
        self.carried = carried

    def __reduce__(self) -> Any:
        return reduce_traceback(self.carried)


def deep(depth: int) -> None:
    if depth:
        deep(depth - 1)
    raise KeyError(depth)


def through(depth: int) -> tuple[TracebackType, TracebackType]:
    try:
        deep(depth)
    except KeyError as error:
        sent = error.__traceback__
        assert sent is not None
        return sent, pickle.loads(pickle.dumps(Carried(sent)))
    raise AssertionError


def test_it_prints_the_same() -> None:
    sent, arrived = through(3)
    assert arrived.tb_frame.f_globals["__name__"] == __name__
    assert [row[:3] for row in traceback.extract_tb(arrived)] == [
        row[:3] for row in traceback.extract_tb(sent)
    ]


def test_it_may_be_longer_than_pickle_can_nest() -> None:
    depth = sys.getrecursionlimit() * 3 // 4
    _, arrived = through(depth)
    assert len(traceback.extract_tb(arrived)) == depth + 2


def test_a_module_with_a_name_that_is_no_text() -> None:
    names = {"__name__": object(), "__file__": None}
    with pytest.raises(ValueError, match="nameless") as raised:
        exec("raise ValueError('nameless')", names)
    arrived = pickle.loads(pickle.dumps(Carried(raised.tb)))
    assert len(traceback.extract_tb(arrived)) == 2
