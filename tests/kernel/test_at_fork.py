"""What a forked child forgets, whoever forks."""

from __future__ import annotations

import gc
import os

import pytest

from fdshare.kernel import at_fork
from fdshare.kernel.at_fork import forget_after_fork


class Known:
    """Something that a process knows of itself."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        forget_after_fork(self)
        forget_after_fork(self)  # as one that was opened again

    def _after_fork(self) -> None:
        self.pid = 0


def test_a_child_forgets_and_its_parent_does_not() -> None:
    known = Known()
    pid = os.fork()
    if pid == 0:
        os._exit(known.pid != 0)
    assert os.waitpid(pid, 0)[1] == 0
    assert known.pid == os.getpid()


def test_what_nobody_refers_to_any_more_is_gone() -> None:
    gc.collect()
    before = len(at_fork._objects)
    known = Known()
    assert len(at_fork._objects) == before + 1
    del known
    assert len(at_fork._objects) == before


def test_an_error_of_one_is_raised_when_the_others_have_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Failing(Known):
        def _after_fork(self) -> None:
            raise KeyboardInterrupt

    monkeypatch.setattr(at_fork, "_objects", set())
    first, failing, last = Known(), Failing(), Known()
    with pytest.raises(KeyboardInterrupt):
        at_fork._forget_all()
    assert (first.pid, failing.pid, last.pid) == (0, os.getpid(), 0)
