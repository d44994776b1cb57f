"""get_context: which package, and which of its contexts."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module

import multiprocess
import pytest

from fdshare import get_context
from fdshare.errors import InvalidArgument
from mp.common import PACKAGES


@pytest.mark.parametrize("package", PACKAGES)
def test_the_default_is_the_packages_default(package: str) -> None:
    default = import_module(package).get_start_method()
    assert get_context(backend=package).get_start_method() == default


def test_the_backend_may_be_the_module() -> None:
    assert get_context("spawn", backend=multiprocess) is get_context(
        "spawn", backend="multiprocess"
    )


def test_what_there_is_not() -> None:
    with pytest.raises(ValueError, match="cannot find context for 'thread'"):
        get_context("thread")
    with pytest.raises(InvalidArgument, match="neither multiprocessing nor multiprocess"):
        get_context("spawn", backend="threading")


def test_dill_comes_only_with_multiprocess() -> None:
    code = (
        "import sys, fdshare\n"
        "fdshare.get_context('spawn').Queue\n"
        "assert not {'dill', 'multiprocess', 'numpy', 'anyio', 'click'} & set(sys.modules)\n"
        "assert 'multiprocessing.managers' not in sys.modules\n"
        "fdshare.get_context('spawn', backend='multiprocess')\n"
        "assert 'dill' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
