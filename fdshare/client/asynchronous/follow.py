"""AsyncFollower: the object that is registered under a name now, for tasks."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from time import monotonic
from typing import Any, Final, Self

import anyio
import anyio.lowlevel

from fdshare.client.asynchronous.pipeline import Pipeline
from fdshare.client.follow_state import FollowState, Seen, check_options
from fdshare.client.mapped_page import MappedPage
from fdshare.errors import ClosedDescriptor, FdshareError

__all__ = ["AsyncFollower"]

# Seconds between attempts to ask a server that could not be asked.
_AGAIN: Final = 1.0


class AsyncFollower:
    """A handle on what is registered under a name: `current()` is always the object of now.

    As `Follower`, for the tasks of one event loop. What `current()` returns is to be used before
    the task waits for anything else: another task's `current()` may replace and close it. To keep
    it longer, use `async with log.lease() as f`.
    """

    def __init__(
        self,
        open_pipeline: Callable[[], Pipeline],
        page: MappedPage,
        name: str,
        timeout: float | None,
        on_change: Callable[[Any], object] | None,
    ) -> None:
        """*open_pipeline* returns the pipeline of the client, or raises ClosedDescriptor; *page* is
        the client's. Raises: InvalidArgument."""
        check_options(timeout, on_change)
        self.name = name
        self._open_pipeline = open_pipeline
        self._on_change = on_change
        self._state = FollowState(name, timeout, page)
        self._lock = anyio.Lock()
        self._again = 0.0  # when to try to ask again
        self._closed = False

    async def current(self) -> Any:
        """The object that is registered now; the handle owns it.

        See `Follower.current`. Where nothing has changed, other tasks do not run meanwhile. Raises:
        NameNotFound, or FetchTimeout where `follow` was given a timeout; AccessDenied;
        ClosedDescriptor; and what `fetch` raises.
        """
        return self._seen().obj if self._is_fresh() else await self._renewed()

    @asynccontextmanager
    async def lease(self) -> AsyncIterator[Any]:
        """As `current`, for an `async with` statement: the object stays open to the end of it.

        It is the handle's even so: do not close it.
        """
        await self.current()
        seen = self._seen()
        yield seen.obj

    @property
    def generation(self) -> int:
        """The generation of the object that was there last; 0 if there was none."""
        return self._state.generation

    @property
    def stale(self) -> bool:
        """True after a `current()` that could not ask the server, and returned the last object."""
        return self._state.stale

    async def close(self) -> None:
        """Closes the object, when nobody leases it any more."""
        self._close()
        await anyio.lowlevel.checkpoint()

    aclose = close

    def _close(self) -> None:
        self._closed = True
        self._state.seen = None

    def _is_fresh(self) -> bool:
        state = self._state
        return (
            state.seen is not None
            and state.seen.is_current()
            and not state.stale
            and self._open_pipeline().reaches(state.server)
        )

    async def _renewed(self) -> Any:
        async with self._lock:
            changed = await self._look()
        obj = self._seen().obj
        if changed and self._on_change is not None:
            self._on_change(obj)
        return obj

    def _seen(self) -> Seen:
        if self._closed or self._state.seen is None:
            self._state.seen = None
            raise ClosedDescriptor(f"the follower of {self.name!r} is closed")
        return self._state.seen

    async def _look(self) -> bool:
        """Makes the state that of now. True if there is another object."""
        state = self._state
        if self._closed or self._is_fresh() or (state.stale and monotonic() < self._again):
            return False
        exchange, known = state.question()
        pipeline = self._open_pipeline()
        try:
            parts, server = await pipeline.ask(exchange, search=not state.stale)
        except FdshareError as error:
            self._again = monotonic() + _AGAIN
            state.refused(error)
            return False
        return state.answered(parts, server, known)

    async def __aenter__(self) -> Self:
        await self.current()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<AsyncFollower of {self.name!r}{' closed' if self._closed else ''}>"
