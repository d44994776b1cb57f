"""Fetched: what a connection remembers of its fetches, so that the next one of a name is short.

A fetch that was made before will be asked for with the same bytes again, and answered with the same
bytes until the entry changes; only the id differs. So both frames are kept, an answer that is the
expected one need not be decoded, and any other is decoded as ever. What is remembered can never be
wrong: an answer is believed for what it says, here by comparing what it says.
"""

from __future__ import annotations

import struct
from typing import Final

from fdshare.client.conversation import Parts
from fdshare.protocol import messages as m
from fdshare.protocol.framing import HEADER, only_frame

__all__ = ["Fetched", "Known"]

_ID: Final = struct.Struct(">I")  # the last field of a header
_REMEMBERED: Final = 1024  # names
_LONGEST: Final = 1024  # bytes of an answer


class Known:
    """One fetch: its two frames, without their ids, and what the answer says."""

    __slots__ = ("_answer", "_answer_head", "_request", "_request_head", "count", "reply")

    def __init__(self, request: bytes, answer: bytes, reply: m.Given, count: int) -> None:
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


class Fetched(dict[str, Known]):
    """name -> what is known of its fetch."""

    def learn(self, name: str, request: bytes, data: memoryview, parts: Parts) -> None:
        """Remembers a fetch that was asked for with *request*, and answered with *parts*; unless
        *data* is more, or less, than the frame of that answer."""
        reply, count = parts.replies[0], len(parts.descriptors)
        if type(reply) is not m.Given or not HEADER.size < len(data) <= _LONGEST:
            return
        if only_frame(data, count) != _ID.unpack_from(request, 8)[0]:
            return
        if len(self) >= _REMEMBERED:
            self.clear()
        self[name] = Known(request, data.tobytes(), reply, count)
