"""on_multiprocessing: where the pickles of our classes find them."""

from __future__ import annotations

import multiprocessing.queues
import pickle
import subprocess
import sys

import pytest

from fdshare.mp import on_multiprocessing as ours


def test_a_class_is_pickled_by_its_name_here() -> None:
    data = pickle.dumps(ours.Queue)
    assert pickle.loads(data) is ours.Queue
    assert issubclass(ours.Queue, multiprocessing.queues.Queue)
    assert ours.Queue.__module__ == ours.__name__


def test_who_never_asked_for_it_finds_it() -> None:
    data = pickle.dumps((ours.Queue, ours.Connection))
    code = f"import pickle; print(pickle.loads({data!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == repr((ours.Queue, ours.Connection))


@pytest.mark.parametrize("name", ["_private", "__path__", "NoSuchClass"])
def test_what_there_is_not(name: str) -> None:
    assert not hasattr(ours, name)
