"""Ours have what the standard objects have, with those parameters, and nothing else in public."""

from __future__ import annotations

import concurrent.futures
import importlib
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
from mp.common import METHODS, PACKAGES, trackers  # noqa: F401

import fdshare
from fdshare.mp.backends import backend_of

Shape = list[tuple[str, str, bool]]


def classes(package: str) -> Iterator[tuple[Any, Any]]:
    """Of ours, each with the one in whose place it is."""
    ours = backend_of(package).CLASSES
    family = ours.family
    for method in METHODS:
        context, stock = fdshare.get_context(method, backend=package), family.context
        yield type(context), type(importlib.import_module(package).get_context(method))
        yield context.Process, getattr(stock, context.Process.__name__)
    for name in ("Queue", "JoinableQueue", "SimpleQueue"):
        yield getattr(ours, name), getattr(family.queues, name)
    yield ours.Connection, family.connection.Connection
    yield ours.Listener, family.connection.Listener
    yield ours.Pool, family.pool.Pool
    yield ours.SyncManager, family.managers.SyncManager
    yield fdshare.ProcessPoolExecutor, concurrent.futures.ProcessPoolExecutor


def names(cls: Any) -> set[str]:
    return {name for name in dir(cls) if not name.startswith("_")}


def shape(function: Any) -> Shape | None:
    """Names, kinds, and which have a default: ours may be annotated, and write None for {}."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # no function in Python
        return None
    return [(p.name, p.kind.name, p.default is not p.empty) for p in parameters]


@pytest.mark.parametrize("package", PACKAGES)
def test_names(package: str) -> None:
    for ours, stock in classes(package):
        assert names(ours) == names(stock), ours


@pytest.mark.parametrize("package", PACKAGES)
def test_parameters(package: str) -> None:
    for ours, stock in classes(package):
        for name in {"__init__", "__call__", *names(stock)}:
            one, other = getattr(ours, name, None), getattr(stock, name, None)
            if not callable(other) or isinstance(other, type):
                continue
            assert shape(one) == shape(other), (ours, name)


@pytest.mark.parametrize("package", PACKAGES)
def test_functions(package: str) -> None:
    ours, stock = backend_of(package).CLASSES, backend_of(package).FAMILY.connection
    for name in ("Pipe", "Client"):
        assert shape(getattr(ours, name)) == shape(getattr(stock, name)), name
