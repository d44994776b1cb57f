"""The end of a lease, awaited behind a take that can no longer be undone."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import anyio

from fdshare.client.conversation import LEASE_END, LeaseEnd

if TYPE_CHECKING:
    import asyncio

__all__ = ["wait_for"]


async def wait_for(lease: LeaseEnd) -> None:
    """Returns at the end of *lease*, or after LEASE_END seconds.

    What was taken is the caller's by now, so the call returns it even if the task is cancelled
    meanwhile: the cancellation reaches the task where it waits next.
    """
    task = _task()
    before = task.cancelling() if task is not None else 0
    try:
        with anyio.move_on_after(LEASE_END, shield=True):
            await anyio.wait_readable(lease.sock)
    except (OSError, RuntimeError):
        pass  # the event loop cannot watch one more: the entry is taken
    except anyio.get_cancelled_exc_class() as error:  # of Task.cancel(), which knows no shield
        if task is not None:
            _cancel_where_it_waits_next(task, before, error)


def _task() -> asyncio.Task[object] | None:
    """The task of asyncio that runs; None in trio."""
    asyncio = sys.modules.get("asyncio")
    loop = asyncio and asyncio._get_running_loop()
    return asyncio.current_task() if asyncio and loop else None


def _cancel_where_it_waits_next(
    task: asyncio.Task[object], before: int, error: BaseException
) -> None:
    """*before* is how often the task had been asked to end before the call."""

    def cancel() -> None:
        # asyncio.timeout() and TaskGroup take their requests back when they end. In Python 3.11 and
        # 3.12 that would not take back a cancel() that has not reached the task, so this one is
        # only made now, when the task has gone on to its next wait.
        if task.cancelling() > before:
            task.uncancel()
            task.cancel(*error.args)

    task.get_loop().call_soon(cancel)
