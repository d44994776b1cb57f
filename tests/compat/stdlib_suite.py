"""CPython's own tests of multiprocessing, with a context of ours in the place of the standard one.

    python tests/compat/stdlib_suite.py fork|spawn|forkserver [unittest options and test names]

`test/_test_multiprocessing.py` of the interpreter that runs this is imported; its mixin for
processes, the package's table of contexts and the name `multiprocessing` in it are exchanged. What
is skipped stands in SKIPPED with its reason, and in docs/compat.md. Spawned children import this
file as their main module, so everything happens on import; they find the method in the environment.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.context
import multiprocessing.managers
import multiprocessing.pool
import os
import sys
import types
import unittest
from typing import Any

from test import _test_multiprocessing as suite

from fdshare.mp.backends import backend_of, get_context
from fdshare.mp.executor import ProcessPoolExecutor  # noqa: F401  (its queues must be importable)

METHOD = "FDSHARE_COMPAT_METHOD"

# Test (class.method, or method) -> why it does not hold here, on purpose.
SKIPPED: dict[str, str] = {
    "test_queue_feeder_donot_stop_onexc": "put() pickles, and raises what pickling raises",
}


class Ours:
    """Stands for the module `multiprocessing`: our context first, the module for the rest."""

    # multiprocessing.Process asks the default context, which is ours, how to start.
    _STOCK = frozenset(
        {"set_start_method", "get_start_method", "get_all_start_methods", "reducer"}
        | {"Process", "get_context"}
    )

    def __init__(self, context: Any) -> None:
        self.context_ = context

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("_") and name not in self._STOCK and hasattr(self.context_, name):
            return getattr(self.context_, name)
        return getattr(multiprocessing, name)


def exchange(method: str) -> None:
    """Put our context in the place of the standard one, here and in what the tests see."""
    context = get_context(method)
    ours = backend_of("multiprocessing").CLASSES
    multiprocessing.context._concrete_contexts.update(backend_of("multiprocessing").CONTEXTS)
    stock = multiprocessing.connection
    connection = types.SimpleNamespace(**vars(stock))
    connection.Listener, connection.Client, connection.Pipe = (
        ours.Listener,
        ours.Client,
        ours.Pipe,
    )
    mixin = suite.ProcessesMixin
    for name, value in list(vars(mixin).items()):
        if name == "connection":
            mixin.connection = connection
        elif not name.startswith("_") and isinstance(value, staticmethod):
            setattr(mixin, name, staticmethod(getattr(context, name)))
    mixin.Process = suite.ManagerMixin.Process = context.Process
    suite.multiprocessing = Ours(context)


def keep(method: str) -> None:
    """Sets the start method again after a test that takes it back: from 3.14 on the tests after it
    would run with another one, the new default."""
    run = unittest.TestCase.run

    def kept(self: unittest.TestCase, result: unittest.TestResult | None = None) -> Any:
        try:
            return run(self, result)
        finally:
            if multiprocessing.get_start_method(allow_none=True) is None:
                multiprocessing.set_start_method(method, force=True)

    unittest.TestCase.run = kept  # type: ignore[method-assign]


def skip(namespace: dict[str, Any]) -> None:
    """Mark what is in SKIPPED."""
    for cls in [value for value in namespace.values() if isinstance(value, type)]:
        for name in dir(cls):
            reason = SKIPPED.get(f"{cls.__name__}.{name}") or SKIPPED.get(name)
            if reason and name.startswith("test"):
                setattr(cls, name, unittest.skip(reason)(getattr(cls, name)))


if METHOD not in os.environ:
    os.environ[METHOD] = sys.argv.pop(1)
exchange(os.environ[METHOD])
keep(os.environ[METHOD])
for kind in ("processes", "manager"):  # its third kind is threads, where nothing is ours
    suite.install_tests_in_module_dict(globals(), os.environ[METHOD], only_type=kind)
suite.install_tests_in_module_dict(globals(), os.environ[METHOD], exclude_types=True)
skip(globals())

if __name__ == "__main__":
    unittest.main()
