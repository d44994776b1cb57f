"""dill_code: what is said where dill cannot pickle the code of a function."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from types import CodeType
from typing import Any

import dill
import lambdas
import pytest
from lambdas import needs_lambdas

from fdshare import get_context
from fdshare.mp.pickling import dill_code
from fdshare.mp.pickling.dill_code import check_code

CODE = (lambda: None).__code__


@pytest.fixture(autouse=True)
def unknown() -> Iterator[None]:
    """A process that has not tried dill yet."""
    dill_code._fails.cache_clear()
    yield
    dill_code._fails.cache_clear()


def test_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def save(pickler: Any, code: CodeType) -> None:
        raise AttributeError("'code' object has no attribute 'co_lnotab'")

    monkeypatch.setitem(dill.Pickler.dispatch, CodeType, save)
    with pytest.raises(pickle.PicklingError, match=rf"dill {dill.__version__} cannot .*<lambda>"):
        check_code(CODE)


@needs_lambdas
def test_nothing_is_said_where_it_can() -> None:
    check_code(CODE)


@pytest.mark.skipif(lambdas.works, reason="dill pickles lambdas on this Python")
def test_who_sends_a_lambda_is_told() -> None:
    near, far = get_context("fork", backend="multiprocess").Pipe()
    with near, far:
        with pytest.raises(pickle.PicklingError, match="install a newer dill"):
            near.send(lambda: 7)
        near.send(None)
        assert far.recv() is None
