"""The shortest way through the server: a frame that asks for an entry, and the frame it is given.

Nine requests of ten are fetches of names that were fetched before. So what such a frame asks for is
remembered by its bytes, all but the id: decoding is a pure function, what is remembered never
becomes wrong. And the answer is kept beside the entry, but for the id, with the control message
that carries its descriptors. Whatever is not as usual is None here and goes the long way round.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from fdshare.errors import BadRequest
from fdshare.kernel.ancillary import Rights, rights
from fdshare.protocol import messages as m
from fdshare.protocol.framing import HEADER, header, only_frame
from fdshare.server.core.table import Entry

__all__ = ["Asked", "Packet", "answer"]

_REMEMBERED: Final = 4096  # frames
_LONGEST: Final = 400  # bytes of a frame that fetches a name of 255
# How such a body goes on after its first byte, which says how many fields there are. Only a hint:
# who encodes in another order goes the long way.
_START: Final = b"\xa4type\xa5fetch\xa4name"
_START_AT: Final = HEADER.size + 1


class Asked(dict[bytes, str]):
    """Frame without its id -> the name that it fetches."""

    def name_in(self, data: bytes) -> str | None:
        """The name, where *data* is one frame, without descriptors, that fetches one; else None."""
        return self.get(data[:8] + data[12:]) or self._learn(data)

    def _learn(self, data: bytes) -> str | None:
        if len(data) > _LONGEST or not data.startswith(_START, _START_AT):
            return None
        if only_frame(data, 0) < 0:
            return None
        try:
            request = m.decode_request(data[HEADER.size :])
        except BadRequest:
            return None
        if type(request) is not m.Fetch:
            return None
        if len(self) >= _REMEMBERED:
            self.clear()
        self[data[:8] + data[12:]] = request.name
        return request.name


class Packet(NamedTuple):
    """An answer but for its id: the header before it, the body after it, the descriptors."""

    head: bytes
    body: bytes
    rights: Rights
    descriptors: int


def answer(entry: Entry, data: bytes) -> tuple[bytes, Rights, int]:
    """(frame, control message, number of descriptors) that give *entry* to who asked with *data*.

    *entry* has its `reply`.
    """
    packet = entry.packet
    if type(packet) is not Packet or packet[1] is not entry.reply:  # it was renamed since
        count = len(entry.handles)
        start = header(len(entry.reply), count, 0)[:8]
        fds = [handle.fd for handle in entry.handles]
        packet = entry.packet = Packet(start, entry.reply, rights(fds), count)
    head, body, fds_ready, count = packet
    return head + data[8:12] + body, fds_ready, count
