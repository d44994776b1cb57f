"""Inspections: answers `info`. Worker threads ask the kernel about each descriptor.

That may block for a descriptor on FUSE or NFS. The handles are pinned meanwhile, and the loop's own
thread sends the answer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import msgspec

from fdshare.errors import FdshareError
from fdshare.protocol import messages as m
from fdshare.protocol.framing import MAX_FRAME
from fdshare.server.core.ports import Session
from fdshare.server.core.table import Entry, Handle
from fdshare.server.loop.inspect import describe_descriptor
from fdshare.server.loop.loop import Loop

__all__ = ["Inspections"]

log = logging.getLogger("fdshare.server")

# info() of a descriptor on a dead FUSE mount blocks its worker for ever; the others go on.
_WORKERS: Final = 4
_PART: Final = MAX_FRAME // 4  # bytes of entries in one part of a long answer


class Inspections:
    """Worker threads, started with the first request."""

    def __init__(self, loop: Loop, stored: Callable[[str], bool | None]) -> None:
        """*stored*: whether the service manager holds an entry, too."""
        self._loop = loop
        self._stored = stored
        self._workers: ThreadPoolExecutor | None = None

    def inspect(self, session: Session, id: int, entries: Sequence[Entry], now: float) -> None:
        """Answers the request with an InfoList of *entries*, soon."""
        if self._workers is None:
            self._workers = ThreadPoolExecutor(_WORKERS, thread_name_prefix="fdshare-inspect")
        shown = [
            (_entry_info(entry, now, self._stored(entry.name)), entry.handles) for entry in entries
        ]
        for _, handles in shown:
            for handle in handles:
                handle.pins += 1
        session.route.inspecting += 1
        self._workers.submit(self._inspect, session, id, shown)

    def stop(self) -> None:
        """Starts no more inspections, and does not wait for those under way."""
        if self._workers is not None:
            self._workers.shutdown(wait=False, cancel_futures=True)

    def _inspect(
        self, session: Session, id: int, shown: list[tuple[m.EntryInfo, tuple[Handle, ...]]]
    ) -> None:
        """Runs in a worker thread."""
        try:
            # To others it would tell which paths exist that they cannot see themselves.
            bodies = _bodies(shown, look_up_path=session.trusted)
        except Exception as error:
            log.exception("a descriptor could not be described")
            bodies = [m.encode(m.refusal(FdshareError(f"the server failed: {error!r}")))]

        def answer() -> None:
            self._loop.answer_in_parts(session, id, bodies)
            for _, handles in shown:
                self._loop.unpin(handles)
            self._loop.inspected(session.route)

        self._loop.post(answer)


def _bodies(
    shown: list[tuple[m.EntryInfo, tuple[Handle, ...]]], *, look_up_path: bool
) -> list[bytes]:
    """The answer, in parts."""
    found = []
    for info, handles in shown:
        described = [describe_descriptor(h.fd, look_up_path=look_up_path) for h in handles]
        found.append(msgspec.structs.replace(info, descriptors=described))
    parts = _parts(found)
    return [m.encode(m.InfoList(p, more=p is not parts[-1])) for p in parts]


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
