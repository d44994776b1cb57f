"""The fast path: a repeated fetch is recognised by its bytes, and its reply is ready to be sent.

Nine requests of ten fetch a name that was fetched before, or the same names together. The bytes of
such a frame, all but the id, are remembered with the name: decoding is a pure function, so what is
remembered stays right. The reply, all but the id, is kept with the entry (of many names, until
anything changes), and so is the control message that carries the descriptors. Every other frame is
decoded and handled as usual.
"""

from __future__ import annotations

from typing import Final, NamedTuple, TypeAlias

from fdshare.errors import BadRequest
from fdshare.kernel.ancillary import Rights, rights
from fdshare.protocol import messages as m
from fdshare.protocol.framing import HEADER, header, only_frame
from fdshare.server.core.reads import GivenTogether
from fdshare.server.core.table import Entry

__all__ = ["FetchFrames", "PreparedReply", "reply_frame"]

_REMEMBERED: Final = 1 << 20  # bytes of all frames
_LONGEST: Final = 1 << 14  # bytes of a frame: 64 names of 250
# Such a body after its first byte, the number of fields. An encoder that orders the fields in
# another way is served, too, but not on this path.
_STARTS: Final = (b"\xa4type\xa5fetch\xa4name", b"\xa4type\xa9fetchmany\xa5names")
_START_AT: Final = HEADER.size + 1

Names: TypeAlias = str | tuple[str, ...]


class FetchFrames(dict[bytes, Names]):
    """Frame without its id -> the name, or names, that it fetches."""

    def __init__(self) -> None:
        self._size = 0

    def names_in(self, data: bytes) -> Names | None:
        """The name, if *data* is one frame without descriptors that fetches one, or the names that
        it fetches together; else None."""
        return self.get(data[:8] + data[12:]) or self._learn(data)

    def _learn(self, data: bytes) -> Names | None:
        if len(data) > _LONGEST or not data.startswith(_STARTS, _START_AT):
            return None
        if only_frame(data, 0) < 0:
            return None
        try:
            request = m.decode_request(data[HEADER.size :])
        except BadRequest:
            return None
        if type(request) is m.FetchMany:
            names: Names = tuple(request.names)
        elif type(request) is m.Fetch and not request.look:
            names = request.name
        else:
            return None
        self._size += len(data)
        if self._size > _REMEMBERED:
            self.clear()
            self._size = len(data)
        self[data[:8] + data[12:]] = names
        return names


class PreparedReply(NamedTuple):
    """A reply without its id: the header before the id, the body after it, the descriptors."""

    head: bytes
    body: bytes
    rights: Rights
    descriptors: int


def reply_frame(entry: Entry | GivenTogether, request: bytes) -> tuple[bytes, Rights, int]:
    """(frame, control message, number of descriptors): the reply to the frame *request*, which
    fetches *entry*, or many. `entry.reply` is encoded already."""
    prepared = entry.prepared
    # Encoded anew, for the entry was renamed: then this is prepared anew, too.
    if type(prepared) is not PreparedReply or prepared[1] is not entry.reply:
        count = len(entry.handles)
        start = header(len(entry.reply), count, 0)[:8]
        fds = [handle.fd for handle in entry.handles]
        prepared = entry.prepared = PreparedReply(start, entry.reply, rights(fds), count)
    head, body, fds_ready, count = prepared
    return head + request[8:12] + body, fds_ready, count
