"""FetchCache: what a connection remembers of its fetches, so that the next one of a name is short.

A fetch that was made before, of one name or of the same names together, is asked for with the same
bytes again, and answered with the same bytes until an entry changes; only the id differs. So both
frames are kept: an answer with the expected bytes need not be decoded, and any other is decoded as
usual. So what is remembered cannot be out of date.
"""

from __future__ import annotations

import struct
from typing import Final

from fdshare.client.conversation import Exchange, WholeAnswer
from fdshare.protocol import messages as m
from fdshare.protocol.framing import HEADER

__all__ = ["CachedFetch", "FetchCache"]

_ID: Final = struct.Struct(">I")  # the last field of a header
_REMEMBERED: Final = 1 << 20  # bytes of all frames


class CachedFetch:
    """One fetch: its two frames, without their ids, and what the answer says."""

    __slots__ = ("_answer", "_answer_head", "_request", "_request_head", "count", "reply")

    def __init__(
        self, request: bytes, answer: bytes, reply: m.Given | m.GivenMany, count: int
    ) -> None:
        self._request_head, self._request = request[:8], request[HEADER.size :]
        self._answer_head, self._answer = answer[:8], answer[HEADER.size :]
        self.reply = reply
        self.count = count

    def stamped(self, id: int) -> tuple[bytes, bytes]:
        """(request, expected answer) of the fetch whose id is *id*."""
        stamp = _ID.pack(id)
        return (
            self._request_head + stamp + self._request,
            self._answer_head + stamp + self._answer,
        )


class FetchCache(dict[str | tuple[str, ...], CachedFetch]):
    """name, or names -> the fetch of it, or them."""

    def __init__(self) -> None:
        self._size = 0

    def learn(
        self, exchange: Exchange, request: bytes, answer: memoryview, parts: WholeAnswer
    ) -> None:
        """Remembers *exchange*, if it is a fetch, which was asked for with the frame *request*, and
        answered with the one frame *answer*, which says *parts*."""
        asked, reply = exchange.request, parts.replies[0]
        if type(asked) is m.Fetch and type(reply) is m.Given:
            if exchange.wait != 0 or asked.look:
                return
            name: str | tuple[str, ...] = asked.name
        elif type(asked) is m.FetchMany and type(reply) is m.GivenMany and reply.items:
            name = tuple(asked.names)
        else:
            return
        self._size += len(request) + len(answer)
        if self._size > _REMEMBERED:
            self.clear()
            self._size = len(request) + len(answer)
        self[name] = CachedFetch(request, answer.tobytes(), reply, len(parts.descriptors))
