"""Inspections: answers `info`. Threads ask the kernel about each descriptor.

That may block for a descriptor on FUSE or NFS, so each is looked at in the lane of the uid that
registered it (lanes.py), with its handles pinned. An answer waits for a moment; what has not been
found out by then is said to hang.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Final

import msgspec

from fdshare.errors import FdshareError, InvalidArgument
from fdshare.kernel.borrowed_socket import can_be_asked
from fdshare.protocol import messages as m
from fdshare.protocol.bind_address import parse_address
from fdshare.protocol.framing import MAX_FRAME
from fdshare.server.core.ports import Session
from fdshare.server.core.table import Entry, Handle
from fdshare.server.core.writes import ADDRESS
from fdshare.server.loop.closing import OURS
from fdshare.server.loop.inspect import describe_descriptor, local_mounts
from fdshare.server.loop.lanes import Lanes
from fdshare.server.loop.loop import Loop

__all__ = ["Inspections"]

log = logging.getLogger("fdshare.server")

_PATIENCE: Final = 2.0  # seconds that an answer waits for file systems
_MANY: Final = 64  # entries of one uid that are looked at in one call
_WORK: Final = 0.0003  # seconds of looking, after which the loop gets its turn
_PART: Final = MAX_FRAME // 4  # bytes of entries in one part of a long answer
_RESERVED: Final = 1024  # bytes for what is found out about one entry, about
_HANGS: Final = m.DescriptorInfo("unknown", health="its file system does not answer")
_NOBODY: Final = m.DescriptorInfo("unknown", health="no thread can be started to look at it")


def _go_on(worked: float) -> None:
    """Gives no way: in the loop's own thread."""


class _Inspection:
    """One request: its entries, and what was found of each; *left* calls are not made yet."""

    __slots__ = (
        *("answered", "found", "handles", "id", "infos", "left", "lock", "session", "unknown"),
        "until",
    )

    def __init__(
        self,
        session: Session,
        id: int,
        infos: list[m.EntryInfo],
        handles: list[tuple[Handle, ...]],
        now: float,
    ) -> None:
        self.session = session
        self.id = id
        self.infos = infos
        self.handles = handles
        self.found: list[list[m.DescriptorInfo] | None] = [None] * len(infos)
        self.unknown = _HANGS  # what is said of those that were not looked at
        self.left = 0
        self.answered = False
        self.until = now + _PATIENCE
        self.lock = threading.Lock()

    def describe(
        self,
        indexes: Sequence[int],
        *,
        look_up: bool,
        give_way: Callable[[float], None] = _go_on,
    ) -> None:
        """Finds out about some of the entries; *look_up*: also where their paths lead to. Calls
        *give_way* with the seconds that it has worked."""
        mounts = cache(local_mounts)
        began = time.monotonic()
        for index in indexes:
            path = _path_of(self.infos[index])
            found = []
            for handle in self.handles[index]:
                if self.session.route is None:  # its client is gone
                    return
                found.append(
                    describe_descriptor(
                        handle.fd, look_up_path=look_up, bound_to=path, mounts=mounts
                    )
                )
                if (worked := time.monotonic() - began) > _WORK:
                    give_way(worked)
                    began = time.monotonic()
            self.found[index] = found

    def is_complete(self) -> bool:
        """Counts a call that has been made. True for the last: the caller has to answer."""
        with self.lock:
            self.left -= 1
            return not self.left and self._claim()

    def is_late(self) -> bool:
        """True if nobody has begun to answer: the caller has to."""
        with self.lock:
            return self._claim()

    def _claim(self) -> bool:
        answered, self.answered = self.answered, True
        return not answered

    def bodies(self) -> list[bytes]:
        """The answer, in parts."""
        infos = []
        for info, handles, found in zip(self.infos, self.handles, self.found, strict=True):
            described = [self.unknown] * len(handles) if found is None else found
            infos.append(msgspec.structs.replace(info, descriptors=described))
        parts = _parts(infos)
        return [m.encode(m.InfoList(p, more=p is not parts[-1])) for p in parts]


class Inspections:
    """The requests that are not answered yet."""

    def __init__(self, loop: Loop, lanes: Lanes, stored: Callable[[str], bool | None]) -> None:
        """*stored*: whether the service manager holds an entry, too."""
        self._loop = loop
        self._lanes = lanes
        self._stored = stored
        self._open: dict[_Inspection, None] = {}  # in the order of `until`

    def inspect(self, session: Session, id: int, entries: Sequence[Entry], now: float) -> None:
        """Answers the request with an InfoList of *entries*, soon."""
        infos = [_entry_info(entry, now, self._stored(entry.name)) for entry in entries]
        inspection = _Inspection(session, id, infos, [entry.handles for entry in entries], now)
        session.route.inspecting += 1
        session.route.reserved += _RESERVED * len(infos)
        self._loop.buffers.recount(session.route)
        if not self._open:
            self._loop.later(_PATIENCE, self._end_late)
        self._open[inspection] = None
        calls = list(self._calls(entries))
        if not self._lanes.has_threads:
            self._describe_here(inspection)
            calls = []
        inspection.left = len(calls) or 1
        for uid, indexes in calls:
            for index in indexes:
                for handle in inspection.handles[index]:
                    handle.pins += 1
            self._lanes.put(uid, partial(self._describe, inspection, uid, indexes))
        if not calls:  # nothing to look at, or nobody to do it
            inspection.is_complete()
            self._send(inspection, inspection.bodies())

    def _calls(self, entries: Sequence[Entry]) -> Iterator[tuple[int, list[int]]]:
        """(uid, indexes of entries) of the calls to be made. No more of a uid that hangs."""
        of: dict[int, list[int]] = {}
        for index, entry in enumerate(entries):
            of.setdefault(entry.put.registrant.uid, []).append(index)
        for uid, indexes in of.items():
            if not self._lanes.hangs(uid):
                for at in range(0, len(indexes), _MANY):
                    yield uid, indexes[at : at + _MANY]

    def _describe_here(self, inspection: _Inspection) -> None:
        """Finds out without a thread, where none could be started, what keeps nobody waiting."""
        inspection.unknown = _NOBODY
        closer = self._loop.closer
        for index, handles in enumerate(inspection.handles):
            if all(closer.at_once(h.fd, h.uid) and can_be_asked(h.fd) for h in handles):
                inspection.describe([index], look_up=False)

    def _describe(self, inspection: _Inspection, uid: int, indexes: Sequence[int]) -> None:
        """Runs in the lane of *uid*."""
        bodies = None
        try:
            # To others it would tell which paths exist that they cannot see themselves.
            look_up = inspection.session.trusted
            give_way = partial(self._lanes.give_way, uid)
            inspection.describe(indexes, look_up=look_up, give_way=give_way)
        except Exception:
            log.exception("a descriptor could not be described")
        if inspection.is_complete():
            bodies = self._encoded(inspection)
        self._loop.post(partial(self._described, inspection, indexes, bodies))

    def _described(
        self, inspection: _Inspection, indexes: Sequence[int], bodies: list[bytes] | None
    ) -> None:
        for index in indexes:
            self._loop.unpin(inspection.handles[index])
        if bodies is not None:
            self._send(inspection, bodies)

    def _end_late(self, now: float) -> None:
        """Has those answered that have waited long enough."""
        for inspection in list(self._open):
            if inspection.until > now:
                self._loop.later(inspection.until - now, self._end_late)
                return
            if inspection.is_late():
                # A long answer takes a while to encode: not in the loop.
                self._lanes.put(OURS, partial(self._answer_late, inspection))

    def _answer_late(self, inspection: _Inspection) -> None:
        """Runs in a lane."""
        bodies = self._encoded(inspection)
        self._loop.post(partial(self._send, inspection, bodies))

    @staticmethod
    def _encoded(inspection: _Inspection) -> list[bytes]:
        if inspection.session.route is None:
            return []
        try:
            return inspection.bodies()
        except Exception as error:
            log.exception("an answer could not be made")
            return [m.encode(m.refusal(FdshareError(f"the server failed: {error!r}")))]

    def _send(self, inspection: _Inspection, bodies: list[bytes]) -> None:
        del self._open[inspection]
        self._loop.answer_in_parts(inspection.session, inspection.id, bodies)
        if inspection.session.route is not None:
            reserved = _RESERVED * len(inspection.infos)
            self._loop.inspected(inspection.session.route, reserved)


def _entry_info(entry: Entry, now: float, stored: bool | None) -> m.EntryInfo:
    return m.EntryInfo(
        name=entry.name,
        generation=entry.generation,
        kind=entry.put.kind.tag,
        registrant=entry.put.registrant,
        age=now - entry.put.at,
        count=len(entry.handles),
        lifetime=entry.put.lifetime,
        ttl=None if entry.expires is None else entry.expires - now,
        grace=entry.put.grace,
        drop_on_hangup=entry.put.drop_on_hangup,
        fetches=entry.fetches,
        leased=entry.lease is not None,
        stored=stored,
        metadata=entry.put.metadata,
    )


def _path_of(info: m.EntryInfo) -> str:
    """The path that the server has bound; empty where that is not known."""
    try:
        return parse_address(info.metadata.get(ADDRESS, "")).path
    except InvalidArgument:  # anybody's metadata
        return ""


def _parts(infos: list[m.EntryInfo]) -> list[list[m.EntryInfo]]:
    """*infos* in parts that fit into a frame each; one that is too long by itself is shortened."""
    parts: list[list[m.EntryInfo]] = [[]]
    room = _PART
    for info in infos:
        size = len(m.encode(info))
        if size > MAX_FRAME - _PART:
            size = len(m.encode(info := _shortened(info)))
        if size > room and parts[-1]:
            parts.append([])
            room = _PART
        parts[-1].append(info)
        room -= size
    return parts


def _shortened(info: m.EntryInfo) -> m.EntryInfo:
    """*info* with the ends of its paths: 250 paths of PATH_MAX are longer than a frame."""
    short = [
        msgspec.structs.replace(each, path=each.path[-256:], local=each.local[-256:])
        for each in info.descriptors
    ]
    return msgspec.structs.replace(info, descriptors=short)
