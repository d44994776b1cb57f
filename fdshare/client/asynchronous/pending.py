"""What waits for answers on the connection of an asynchronous client: requests and watches."""

from __future__ import annotations

import time
from typing import Final, Protocol

import anyio
import anyio.lowlevel

from fdshare.client.conversation import Answer, Exchange, WholeAnswer
from fdshare.client.settings import Search
from fdshare.client.watch_state import WatchState
from fdshare.kernel.ancillary import discard_all
from fdshare.protocol import messages as m

__all__ = ["Pending", "PendingRequest", "Subscription", "catch_up"]

# Of an event loop that stood still, until a task has read what came meanwhile: the loop looks at
# its sockets, perhaps later than at the time, and then the task runs, perhaps last of all.
_TURNS: Final = 3


class Pending(Protocol):
    """A request that waits for answers, and is sent again on a new connection."""

    id: int
    exchange: Exchange
    search: Search
    sent: bool
    abandoned: bool

    def answer(self, answer: Answer) -> bool:
        """Takes an answer over; True where it was the last."""

    def lost(self) -> None:
        """The connection ended; parts of an answer that came are dropped."""

    def fail(self, error: BaseException) -> None:
        """There will be no answer."""


class PendingRequest:
    """A request that one task waits for."""

    __slots__ = (
        "_started",
        "abandoned",
        "done",
        "error",
        "exchange",
        "id",
        "parts",
        "search",
        "sent",
        "server",
    )

    def __init__(self, id: int, exchange: Exchange, search: Search) -> None:
        self.id = id
        self.exchange = exchange
        self.search = search
        self.sent = False  # at least its first byte, and so its descriptors
        self.abandoned = False
        self.done = anyio.Event()
        self.error: BaseException | None = None
        self.parts = WholeAnswer()
        self.server: m.Welcome | None = None  # that gave the answer
        self._started = time.monotonic()

    def answer(self, answer: Answer) -> bool:
        if self.abandoned:
            discard_all(answer.descriptors)
            return not getattr(answer.reply, "more", False)
        if not self.parts.add(answer):
            return False
        self.done.set()
        return True

    def lost(self) -> None:
        self.discard()
        self.exchange.shorten(self._started)

    def fail(self, error: BaseException) -> None:
        self.discard()
        self.error = error
        self.done.set()

    def discard(self) -> None:
        """Closes what came so far."""
        discard_all(self.parts.descriptors)
        self.parts = WholeAnswer()


class Subscription:
    """A watch on the connection: it feeds a `WatchState`, whose owner waits for `ready`."""

    def __init__(self, id: int, state: WatchState, search: Search) -> None:
        self.id = id
        self.state = state
        self.exchange = Exchange(m.Watch(state.pattern))
        self.search = search
        self.sent = False
        self.abandoned = False
        self.error: BaseException | None = None
        self._ready: anyio.Event | None = None

    async def ready(self) -> None:
        """Returns when something came, or `error` is set."""
        if self.error is None:
            self._ready = anyio.Event()
            await self._ready.wait()

    def notify(self) -> None:
        """Makes `ready` return."""
        if self._ready is not None:
            self._ready.set()

    def answer(self, answer: Answer) -> bool:
        discard_all(answer.descriptors)
        reply = answer.reply
        if type(reply) is m.SnapshotPart:
            self.state.snapshot(reply)
            if self.state.live:
                self.notify()
            return False
        if type(reply) is m.Refused:
            self.fail(m.refusal_error(reply))
        return True

    def event(self, event: m.Event) -> None:
        if self.state.event(event):
            self.notify()

    def lost(self) -> None:
        self.state.lost()

    def fail(self, error: BaseException) -> None:
        self.error = error
        self.notify()


async def catch_up() -> None:
    """Lets the task that reads go on, before one gives up whose time is over.

    If the event loop stood still for so long, the answer may be there, and nobody has seen it.
    """
    for _ in range(_TURNS):
        await anyio.lowlevel.checkpoint()
