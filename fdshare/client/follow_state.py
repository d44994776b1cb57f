"""FollowState: what a follower knows, without the waiting. Answers in, the object out.

Theory of operation. An answer brings the object, and a stamp that stands in a slot of the server's
page. As long as it stands there, the object is what a fetch would give (server/core/slots.py), and
to look takes no system call. With another stamp there the follower asks again::

    nothing ──(answer)──> fresh ──(another stamp)──> asks ──(answer)──> fresh ...
                            ^                         │
                            └── stale <──(no server)──┘

An object is closed when nobody refers to it any more: the state, a thread that it was given to, and
who has leased it each refer to the `FollowedObject`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from fdshare.client import verbs
from fdshare.client.conversation import Exchange, WholeAnswer, check_seconds
from fdshare.client.mapped_page import BLANK, MappedPage
from fdshare.errors import (
    AccessDenied,
    FdshareError,
    FetchTimeout,
    InvalidArgument,
    NameNotFound,
    NoServer,
    ProtocolError,
    ServerGone,
)
from fdshare.kernel.descriptor import Descriptor
from fdshare.kernel.finaliser import finaliser
from fdshare.kinds import discard
from fdshare.protocol import messages as m

__all__ = ["FollowState", "FollowedObject", "Seen", "check_options"]

_COROUTINE: Final = 0x80  # inspect.CO_COROUTINE; inspect itself takes 5 ms to import
_NEVER: Final = 1  # a stamp that does not stand there


def check_options(timeout: object, on_change: object) -> None:
    """Raises: InvalidArgument: `follow` cannot use them, now or later."""
    if timeout is not None:
        check_seconds("timeout", timeout)
        if timeout < 0:  # type: ignore[operator]
            raise InvalidArgument("timeout", f"{timeout!r} is negative; None waits for ever")
    if on_change is None:
        return
    if not callable(on_change):
        raise InvalidArgument("on_change", f"{on_change!r} cannot be called")
    flags = getattr(getattr(on_change, "__code__", None), "co_flags", 0)
    if flags & _COROUTINE:
        raise InvalidArgument("on_change", f"{on_change!r} would have to be awaited")


class FollowedObject:
    """One object of a name, which is closed when nothing refers to this any more."""

    __slots__ = ("generation", "obj")

    def __init__(self, obj: Any, generation: int) -> None:
        self.obj = obj
        self.generation = generation

    @finaliser
    def __del__(self) -> None:
        discard(self.obj)


class Seen(NamedTuple):
    """A version, and where it is to be seen whether it is the current one: it is as long as *slot*,
    one word of the page, has *stamp*. *obj* is the version's, with a step less to it."""

    obj: Any
    slot: Sequence[int]
    stamp: int
    version: FollowedObject

    def is_current(self) -> bool:
        """Whether no change of the name has been acknowledged since the server was asked."""
        return self.slot[0] == self.stamp


class FollowState:
    """One name that is followed. The clients ask, under a lock, and differ in how they wait."""

    def __init__(self, name: str, timeout: float | None, page: MappedPage) -> None:
        """*page* is that of the client, whose followers share it."""
        self.name = name
        self.timeout = timeout
        self.seen: Seen | None = None
        self.server: m.Welcome | None = None  # that has answered last
        self.stale = False
        self._answered = False
        self._page = page

    @property
    def generation(self) -> int:
        """The generation of the object that was there last; 0 if there was none."""
        return 0 if self.seen is None else self.seen.version.generation

    def question(self) -> tuple[Exchange, int]:
        """What is to be asked, and the generation that is known, for `answered`."""
        known = self.generation
        epoch = "" if self.server is None else self.server.epoch
        return verbs.following(self.name, self.timeout, known, epoch, self._page.now[0]), known

    def answered(self, parts: WholeAnswer, server: m.Welcome | None, known: int) -> bool:
        """Takes the answer over. True if it brought another object than there was before it.

        A signal's handler may have asked since, and taken over a later answer: it is at least as
        new. Raises: ProtocolError, and as `rebuild`.
        """
        answer, obj, descriptor = verbs.followed(parts, known)
        version = None if answer.kind is None else FollowedObject(obj, answer.generation)
        slot, stamp = self._where(answer, descriptor)
        before = self.seen
        if version is None:
            if before is None or before.version.generation != known:
                return False
            version = before.version
        self.seen = Seen(version.obj, slot, stamp, version)
        self.server, self.stale = server, False
        first, self._answered = not self._answered, True
        return not first and (before is None or before.version is not version)

    def _where(
        self, answer: m.Followed, descriptor: Descriptor | None
    ) -> tuple[Sequence[int], int]:
        if descriptor is not None:
            self._page.map(answer.page, descriptor)
        if not answer.slot:
            return BLANK, _NEVER
        id, words = self._page.now
        if answer.page != id or not 0 < answer.slot < len(words):
            raise ProtocolError(f"there is no slot {answer.slot} in page {answer.page}")
        return words[answer.slot : answer.slot + 1], answer.stamp

    def refused(self, error: FdshareError) -> None:
        """Returns if there is an object, and no server that could be asked: it is stale. Raises
        *error* else; where the name is missing or not for us, there is no object any more."""
        if isinstance(error, NoServer | ServerGone):
            if self.seen is not None:
                self.stale = True
                return
        elif isinstance(error, NameNotFound | FetchTimeout | AccessDenied):
            self.seen, self.stale = None, False
        raise error
