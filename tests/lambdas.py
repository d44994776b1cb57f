"""Whether dill can pickle lambdas, closures and what is defined in __main__, on this Python."""

from __future__ import annotations

import platform

import dill
import pytest


def _works() -> bool:
    try:
        dill.dumps((lambda: None).__code__)
    except AttributeError:
        return False
    return True


works = _works()
needs_lambdas = pytest.mark.skipif(
    not works,
    reason=f"dill {dill.__version__} pickles no lambdas on Python {platform.python_version()}",
)
