"""Follower: the object that is registered under a name now, for the price of a comparison."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any, Final, Protocol, Self

from fdshare.client.conversation import Exchange, WholeAnswer
from fdshare.client.follow_state import FollowState, Seen, check_options
from fdshare.client.mapped_page import MappedPage
from fdshare.errors import ClosedDescriptor, FdshareError
from fdshare.kernel.at_fork import forget_after_fork
from fdshare.protocol import messages as m

__all__ = ["Follower"]

# Seconds between looks whether the server is there, and between attempts to ask one that is not.
_LOOK: Final = 1.0


class Asked(Protocol):
    """What a follower needs of its client."""

    _page: MappedPage

    def _ask(self, exchange: Exchange, *, search: bool) -> tuple[WholeAnswer, m.Welcome]:
        """The answer, and the server that gave it; without *search*, a server that is lost is not
        looked for."""

    def _reaches(self, server: m.Welcome) -> bool:
        """Whether a connection to *server* is open now."""


class Follower:
    """A handle on what is registered under a name: `current` is always the object of now.

    `current` looks into memory that the server writes, and asks the server only after a change.
    The object is this handle's to close: do not close it. The one that `current` returned stays
    open in that thread until the thread's next `current`; for longer, use `with log.lease() as f`.
    Then it is closed as soon as nobody has it any more.

    Any number of threads may use one handle. A forked child goes on with its own. Closing the
    client closes it, too.
    """

    def __init__(
        self,
        client: Asked,
        name: str,
        timeout: float | None,
        on_change: Callable[[Any], object] | None,
        end: Callable[[], object] | None = None,
    ) -> None:
        """Asks for the object at once. *end* is called when this is closed. Raises: as `current`;
        InvalidArgument."""
        check_options(timeout, on_change)
        self.name = name
        self._client = client
        self._on_change = on_change
        self._end = end
        self._state = FollowState(name, timeout, client._page)
        # seen: the fields of the `Seen` that the thread was given last, and until when they hold
        # without a look whether the server is there. Another thread may know better by then.
        self._threads = threading.local()
        self._due = 0.0  # the same of the state's
        self._closed = False
        self._lock = threading.RLock()  # a signal's handler may use it during a call of ours
        forget_after_fork(self)
        self._renew()

    @property
    def current(self) -> Any:
        """The object that is registered now; the handle owns it.

        Once a `register` of the name has returned, anywhere, every `current` that begins afterwards
        has the new object. *on_change* is called in here. Raises: NameNotFound, or FetchTimeout
        where `follow` was given a timeout; AccessDenied; ClosedDescriptor; and what `fetch` raises.
        """
        try:
            obj, slot, stamp, version, due = self._threads.seen
        except AttributeError:
            pass
        else:
            if slot[0] == stamp and monotonic() < due:
                return obj
            # It may be closed now. No variable of a frame of ours keeps it open: those of frames in
            # the traceback of an error would.
            del obj, version
            vars(self._threads).pop("seen", None)  # if no signal's handler has
        seen, due = self._renew()
        self._threads.seen = (*seen, due)  # CPython takes a named one apart in three times the time
        return seen.obj

    @contextmanager
    def lease(self) -> Iterator[Any]:
        """As `current`, for a `with` statement: the object stays open to the end of it.

        It is the handle's even so: do not close it.
        """
        seen, _ = self._renew()
        yield seen.obj

    @property
    def generation(self) -> int:
        """The generation of the object that was there last; 0 if there was none."""
        return self._state.generation

    @property
    def stale(self) -> bool:
        """True while the server cannot be asked: then `current` is the last object there was.

        Looks now, whatever was found before; the thread's next `current` is what it found.
        """
        self._due = 0.0
        given = vars(self._threads).get("seen")
        if given is not None:
            self._threads.seen = (*given[:-1], 0.0)
        try:
            self._renew()
        except FdshareError:
            pass
        return self._state.stale

    def close(self) -> None:
        """Closes the object, when nobody leases it any more."""
        self._closed = True
        self._state.seen = None
        self._threads = threading.local()
        end, self._end = self._end, None
        if end is not None:
            end()

    def _renew(self) -> tuple[Seen, float]:
        """What is there now, asked for if it is not known, and until when it is trusted."""
        with self._lock:
            changed = self._look()
            seen, due = self._state.seen, self._due
            if self._closed or seen is None:
                self._state.seen = None
                raise ClosedDescriptor(f"the follower of {self.name!r} is closed")
        if changed and self._on_change is not None:
            self._on_change(seen.obj)
        return seen, due

    def _look(self) -> bool:
        """Makes the state that of now. True if there is another object."""
        state, now = self._state, monotonic()
        if self._closed:
            return False
        if state.seen is not None:
            if now < self._due and (state.stale or state.seen.is_current()):
                return False
            there = state.server is not None and self._client._reaches(state.server)
            if there and state.seen.is_current():
                self._due, state.stale = now + _LOOK, False
                return False
        exchange, known = state.question()
        try:
            parts, server = self._client._ask(exchange, search=not state.stale)
        except FdshareError as error:
            self._due = monotonic() + _LOOK
            state.refused(error)
            return False
        self._due = now + _LOOK
        return state.answered(parts, server, known)

    def _after_fork(self) -> None:
        """In the child, whose connections are others."""
        self._lock = threading.RLock()  # another thread of the parent may have held it
        self._due = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Follower of {self.name!r}{' closed' if self._closed else ''}>"
