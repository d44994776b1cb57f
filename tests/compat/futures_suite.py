"""CPython's own tests of concurrent.futures, with fdshare.ProcessPoolExecutor in its place.

    python tests/compat/futures_suite.py [unittest options and test names]

The mixins of `test/test_concurrent_futures/util.py` say which executor the tests are about; theirs
for process pools get ours, and with "stock" in $FDSHARE_COMPAT_EXECUTOR the standard executor on a
context of ours. What is skipped stands in SKIPPED with its reason, and in docs/compat.md.
"""

from __future__ import annotations

import importlib
import os
import unittest
from typing import Any

from test.test_concurrent_futures import util

import fdshare
from fdshare.mp.backends import backend_of

MODULES = ("as_completed", "deadlock", "init", "process_pool", "shutdown", "wait")
MIXINS = ("ProcessPoolForkMixin", "ProcessPoolSpawnMixin", "ProcessPoolForkserverMixin")

_EARLY = "submit() pickles, and raises what pickling raises"
_ALONE = "what cannot be unpickled fails its own future, not the whole pool"

# Test (method) -> why it does not hold for ours, on purpose.
SKIPPED: dict[str, str] = {
    "test_error_at_task_pickle": _EARLY,
    "test_shutdown_deadlock_pickle": _EARLY,
    "test_saturation": _EARLY,
    "test_processes_terminate": _EARLY,
    "test_error_at_task_unpickle": _ALONE,
    "test_exit_at_task_unpickle": _ALONE,
    "test_error_during_result_unpickle_in_result_handler": _ALONE,
    "test_python_finalization_error": "calls are sent without the thread that it forbids",
    "test_shutdown_no_wait_max_tasks_gh119592": "what was submitted before shutdown() is done",
    "test_hang_gh83386": "imports the standard executor by the name of the class",
}


def get_context(self: Any) -> Any:
    return backend_of("multiprocessing").CONTEXTS[self.ctx]


# Those that do not hold for the standard executor on a context of ours either.
WITH_STOCK = {"test_python_finalization_error"}

OURS = os.environ.get("FDSHARE_COMPAT_EXECUTOR") != "stock"
for name in MIXINS:
    mixin = getattr(util, name)
    mixin.get_context = get_context
    if OURS:
        mixin.executor_type = fdshare.ProcessPoolExecutor


def load_tests(loader: Any, _tests: Any, _pattern: Any) -> unittest.TestSuite:
    """Those of process pools."""
    suite = unittest.TestSuite()
    for name in MODULES:
        module = importlib.import_module(f"test.test_concurrent_futures.test_{name}")
        for cls in vars(module).values():
            if isinstance(cls, type) and issubclass(cls, tuple(getattr(util, m) for m in MIXINS)):
                for method, reason in SKIPPED.items():
                    if (OURS or method in WITH_STOCK) and hasattr(cls, method):
                        setattr(cls, method, unittest.skip(reason)(getattr(cls, method)))
                suite.addTests(loader.loadTestsFromTestCase(cls))
    return suite


if __name__ == "__main__":
    unittest.main()
