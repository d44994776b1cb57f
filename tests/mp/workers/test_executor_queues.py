"""The queues of executors: the standard executor's call queue becomes one of ours."""

from __future__ import annotations

import concurrent.futures
from typing import Any

from fdshare import get_context
from fdshare.mp.backends import backend_of
from fdshare.mp.workers.executor_queues import adopt
from mp.common import trackers  # noqa: F401


def test_a_call_queue_is_adopted_once() -> None:
    executor = concurrent.futures.ProcessPoolExecutor(1, mp_context=get_context("spawn"))
    queue: Any = executor._call_queue
    classes = backend_of("multiprocessing").CLASSES
    adopt(classes.CallQueue, queue)
    reader = queue._reader
    adopt(classes.CallQueue, queue)
    assert queue._reader is reader
    assert isinstance(reader, classes.Connection)
    executor.shutdown()
