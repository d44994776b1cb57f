"""Watcher: a blocking iterator over what changes, on a connection of its own."""

from __future__ import annotations

import time
from typing import Self

from fdshare.client.blocking.connection import BlockingConnection, ConnectionLost
from fdshare.client.conversation import Answer, Exchange
from fdshare.client.settings import BaseClient
from fdshare.client.watch_state import WatchItem, WatchState
from fdshare.errors import ClosedDescriptor, ServerTimeout, WatchTimeout
from fdshare.kernel.ancillary import discard_all
from fdshare.kernel.finaliser import finaliser
from fdshare.protocol import messages as m

__all__ = ["Watcher"]


class Watcher:
    """An iterator over snapshots and events of the names that match a pattern.

    The first item is a Snapshot, then come the Events in the order of their serial, none missing,
    none twice. If this side was too slow, or the server was lost, another Snapshot says what is
    registered now. `held` maps name -> generation as of the last item, so a loop need not look at
    the items at all. It has a connection of its own; for one thread at a time.

    Iterating raises WatchTimeout, after which it goes on; ServerGone, after which it can be tried
    again; AccessDenied; ClosedDescriptor if the client is closed. It ends when it is closed.
    """

    def __init__(self, client: BaseClient, pattern: str, timeout: float | None) -> None:
        self.pattern = pattern
        self.timeout = timeout
        self._client = client
        self._state = WatchState(pattern)
        self._connection = BlockingConnection(client._dialer, client._authkey, client.timeout)
        self._request = Exchange(m.Watch(pattern))
        self._asked = 0  # which connection has our request
        self._heard_at = 0.0  # when something came last
        self._doubted = False  # nothing has for long, and the server was asked whether it is there
        self._closed = False

    @property
    def held(self) -> dict[str, int]:
        """name -> generation, as of the last item; do not change it."""
        return self._state.held

    def __repr__(self) -> str:
        return f"<Watcher of {self.pattern!r}{' closed' if self._closed else ''}>"

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> WatchItem:
        end = None if self.timeout is None else time.monotonic() + self.timeout
        while (change := self._state.draw()) is None:
            if self._closed:
                raise StopIteration
            if self._client._closed:
                raise ClosedDescriptor("the client is closed")
            self._receive(end)
        return change

    def _receive(self, end: float | None) -> None:
        """Feeds what comes next, at most until *end*."""
        live, deadline, patience = self._state.live, end, self._client.timeout
        if patience is not None:
            due = (self._heard_at if live else time.monotonic()) + patience
            deadline = due if end is None else min(end, due)
        try:
            if live:
                answers = self._connection.receive(deadline)
            else:
                answers = self._connection.persist(
                    lambda: self._ask(deadline), deadline, self._client.reconnect
                )
        except ConnectionLost:
            # What answers on the next one gets its own time: this one's may be over, because
            # nobody listened, or the server hung.
            self._connection.close()
            self._state.lost()
            return
        except ServerTimeout:
            if end is not None and time.monotonic() >= end:
                raise WatchTimeout(self.pattern, self.timeout or 0.0) from None
            if not live:
                self._connection.close()
                raise ServerTimeout(self._client.address, patience or 0.0) from None
            self._look_after()
            return
        self._heard_at, self._doubted = time.monotonic(), False
        for answer in answers:
            self._feed(answer)

    def _look_after(self) -> None:
        """Asks a server that has said nothing for long whether it is there. One that was killed can
        hang in its end, and never close the connection."""
        doubted, self._doubted = self._doubted, not self._doubted
        if doubted:
            self._connection.close()
            return
        try:
            self._connection.send(Exchange(m.Ping()), time.monotonic())
            self._heard_at = time.monotonic()
        except (ConnectionLost, ServerTimeout):
            pass  # it is closed now

    def _ask(self, deadline: float | None) -> list[Answer]:
        if self._asked != self._connection.opened:
            self._state.lost()
            self._connection.send(self._request, deadline)
            self._asked = self._connection.opened
        try:
            return self._connection.receive(deadline)
        except ConnectionLost:
            self._connection.close()
            raise

    def _feed(self, answer: Answer) -> None:
        reply = answer.reply
        discard_all(answer.descriptors)
        if type(reply) is m.Event:
            self._state.event(reply)
        elif type(reply) is m.SnapshotPart:
            self._state.snapshot(reply)
        elif type(reply) is m.Overflowed:
            self._state.overflowed()
        elif type(reply) is m.Refused:
            self._connection.close()
            raise m.refusal_error(reply)

    def close(self) -> None:
        """Ends the iteration."""
        self._closed = True
        self._connection.close()

    def _after_fork(self) -> None:
        """In the child, where the connection is the parent's: the next item comes on another."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @finaliser
    def __del__(self) -> None:
        if hasattr(self, "_connection"):
            self._connection.close()
