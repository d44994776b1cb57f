"""AsyncWatcher: an asynchronous iterator over what changes, on the client's connection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import anyio
import anyio.lowlevel

from fdshare.client.asynchronous.pending import Subscription, catch_up
from fdshare.client.asynchronous.pipeline import Pipeline
from fdshare.client.settings import BaseClient
from fdshare.client.watch_state import WatchItem, WatchState
from fdshare.errors import ServerTimeout, WatchTimeout

__all__ = ["AsyncWatcher"]


class AsyncWatcher:
    """An asynchronous iterator over snapshots and events of the names that match a pattern.

    As `Watcher`, for one task at a time; it uses the client's connection. Items that nobody asks
    for are kept up to a bound, and then folded into one Snapshot of what is registered now.
    """

    def __init__(
        self,
        client: BaseClient,
        open_pipeline: Callable[[], Pipeline],
        pattern: str,
        timeout: float | None,
    ) -> None:
        """*open_pipeline* returns the pipeline of *client*, or raises ClosedDescriptor."""
        # First: __del__ asks for them.
        self._subscription: Subscription | None = None
        self._pipeline: Pipeline | None = None  # where the subscription is
        self.pattern = pattern
        self.timeout = timeout
        self._client = client
        self._open_pipeline = open_pipeline
        self._state = WatchState(pattern)
        self._closed = False

    @property
    def held(self) -> dict[str, int]:
        """name -> generation, as of the last item; do not change it."""
        return self._state.held

    def __repr__(self) -> str:
        return f"<AsyncWatcher of {self.pattern!r}{' closed' if self._closed else ''}>"

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> WatchItem:
        with anyio.move_on_after(self.timeout):
            return await self._next()
        raise WatchTimeout(self.pattern, self.timeout or 0.0)

    async def _next(self) -> WatchItem:
        await anyio.lowlevel.checkpoint()  # before anything is drawn: what is drawn is returned
        while (change := self._state.draw()) is None:
            if self._closed:
                raise StopAsyncIteration
            await self._ready()
        return change

    async def _ready(self) -> None:
        """Returns when there may be more to draw."""
        if self._subscription is None:
            self._pipeline = self._open_pipeline()
            self._subscription = self._pipeline.subscribe(self._state)
        subscription = self._subscription
        # Only the first answer has to come in time; events come when they come.
        patience = None if self._state.live else self._client.timeout
        with anyio.move_on_after(patience) as scope:
            await subscription.ready()
        if scope.cancelled_caught:
            await catch_up()
        if subscription.error is not None:
            self._subscription = None  # the next try is a new one
            raise subscription.error
        if scope.cancelled_caught and not self._state.live:
            raise ServerTimeout(self._client.address, patience or 0.0)

    async def close(self) -> None:
        """Ends the iteration."""
        self._closed = True
        if self._pipeline is not None and self._subscription is not None:
            self._pipeline.unsubscribe(self._subscription)
            self._subscription.notify()
        await anyio.lowlevel.checkpoint()

    aclose = close

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    def __del__(self) -> None:
        if self._pipeline is not None and self._subscription is not None:
            self._pipeline.dropped.append(self._subscription)
