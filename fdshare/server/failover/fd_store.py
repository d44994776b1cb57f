"""FdStore: the table in a service manager's file descriptor store, where it outlives both halves.

systemd keeps what a service sends with FDSTORE=1 and passes it to the next start (sd_notify(3),
systemd.service(5) FileDescriptorStoreMax=). It keeps a name beside each descriptor and nothing
else, so the table itself is stored, too: in a memfd, as an image and the records since.

    fdshare-table   the memfd        fdshare-1, fdshare-2 ...   one handle each

A record is in the store before its client hears "ok". Both halves of a server hold the memfd, and
only the server writes to it; a successor compares it with the table that it was given.
"""

from __future__ import annotations

import logging
import os
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

import msgspec

from fdshare.activation import store, unstore
from fdshare.errors import FdshareError
from fdshare.kernel.descriptor import Descriptor
from fdshare.server.core.image import Image, image_of, table_of
from fdshare.server.core.records import Record
from fdshare.server.core.table import Entry, Table
from fdshare.server.loop.closing import Handle

__all__ = ["PREFIX", "TABLE", "FdStore"]

log = logging.getLogger("fdshare.server")

PREFIX: Final = "fdshare-"
TABLE: Final = f"{PREFIX}table"
_START: Final = struct.Struct("=Q")  # of the image; the memfd never leaves this machine
_FRAME: Final = struct.Struct("=II")  # length and CRC-32 of what follows
_END: Final = bytes(_FRAME.size)
_PATIENCE: Final = 1.0  # seconds for a service manager that does not read
_SLACK: Final = 1 << 16  # bytes of records, and three times the image: then a new image is written


class _Base(msgspec.Struct, tag="base"):
    """The table at some moment; *labels* are what the image's record draws."""

    epoch: str
    image: Image
    labels: list[str]


class _Step(msgspec.Struct, tag="step"):
    """A record since then; *labels* are what it draws."""

    record: Record
    labels: list[str]


_encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder(_Base | _Step).decode


class FdStore:
    """The memfd, and what it says that the service manager holds: a table of labels."""

    def __init__(self, memfd: Descriptor) -> None:
        """Takes *memfd* over."""
        self.memfd = memfd
        self.epoch = ""
        self.held = Table()
        self._last = 0  # of the labels
        self._at = _START.size  # where the next record goes
        self._base = 0  # bytes of the image
        self._load()

    @classmethod
    def new(cls, epoch: str) -> FdStore:
        """An empty store, whose memfd the service manager holds. The caller owns the result."""
        made = cls(Descriptor(os.memfd_create(TABLE, os.MFD_CLOEXEC)))
        made.epoch = epoch
        made._write_base()
        _keep(TABLE, made.memfd.fileno())
        return made

    # After the end of both halves: what was passed back.

    def restore(self, passed: Mapping[str, Descriptor]) -> Table:
        """The table, with handles of the descriptors *passed* back by label. Those that it does not
        refer to are closed, and the service manager is told to close them. Takes *passed* over."""
        image, labels = image_of(self.held)
        kept: list[str] = []
        lost: set[str] = set()
        draw = iter(labels)
        for change in image.record.changes:
            drawn = [next(draw) for _ in range(change.draws)]
            name = getattr(change, "name", "")
            if name in lost or any(label not in passed for label in drawn):
                # The manager's limit, or a start of something else in between.
                lost.add(name)
                log.error("%r is lost: the service manager has not kept it", name)
            else:
                kept += drawn
        for label in passed.keys() - set(kept):
            passed[label].close()
            _let_go(label)
        changes = [c for c in image.record.changes if getattr(c, "name", "") not in lost]
        image.record = Record(changes)
        image.fetches = {name: n for name, n in image.fetches.items() if name not in lost}
        return table_of(image, [Handle(passed[label].detach()) for label in kept])

    # While serving.

    def reconcile(self, table: Table) -> None:
        """Makes the store hold what *table* does: a predecessor may have died while it wrote."""
        image, handles = image_of(table)
        labels = self._labels_for(table)
        before = set(self.held.handles())
        for label, handle in zip(labels, handles, strict=True):
            if label not in before:
                _keep(label, handle.fd)
        self.held = table_of(image, list(labels))
        self._write_base()
        for label in before - set(labels):
            _let_go(label)

    def record(self, record: Record, fds: Sequence[int]) -> None:
        """*record* and the *fds* that it draws are in the store when this returns. *fds* are
        borrowed for the call. Never fails: what the service manager does not take is logged."""
        labels = [self._new_label() for _ in fds]
        for label, fd in zip(labels, fds, strict=True):
            _keep(label, fd)
        self._append(_Step(record, labels))
        for label in self.held.apply(record, list(labels)).closed:
            _let_go(label)
        if self._at > self._base * 4 + _SLACK:
            self._write_base()

    def _labels_for(self, table: Table) -> list[str]:
        """A label for each handle of *table*, in the order of its image: the one that it has, if
        the store knows the entry."""
        labels: list[str] = []
        for entry in table.entries.values():
            known = self.held.entries.get(entry.name)
            if known is None or known.generation != entry.generation:
                labels += [self._new_label() for _ in entry.all_handles()]
                continue
            labels += known.handles
            if entry.guard is not None:
                labels.append(known.guard or self._new_label())
            if entry.lease is not None:
                labels.append(_lease_label(entry, known) or self._new_label())
        return labels

    def _new_label(self) -> str:
        self._last += 1
        return f"{PREFIX}{self._last}"

    # The memfd.

    def _load(self) -> None:
        """Reads what is written, up to the first record that is not whole: its writer died
        there."""
        data = os.pread(self.memfd.fileno(), os.fstat(self.memfd.fileno()).st_size, 0)
        if len(data) < _START.size:
            return
        at = _START.unpack_from(data)[0]
        for body in _frames(data, at):
            step = _decode(body)
            if isinstance(step, _Base):
                self.epoch = step.epoch
                self.held = table_of(step.image, list(step.labels))
                self._base = len(body)
            else:
                self.held.apply(step.record, list(step.labels))
            self._note_labels(step.labels)
            at += _FRAME.size + len(body)
        self._at = at

    def _note_labels(self, labels: Sequence[str]) -> None:
        numbers = [int(label.removeprefix(PREFIX)) for label in labels]
        self._last = max([self._last, *numbers])

    def _write_base(self) -> None:
        image, labels = image_of(self.held)
        frame = _frame(_encode(_Base(self.epoch, image, labels)))
        fd = self.memfd.fileno()
        start = _START.unpack(os.pread(fd, _START.size, 0).ljust(_START.size, b"\0"))[0]
        # Never over the image and the records that are valid until _START is written.
        fits = _START.size + len(frame) + len(_END) <= start
        at = _START.size if fits else max(self._at + len(_END), _START.size)
        os.pwrite(fd, frame + _END, at)
        os.pwrite(fd, _START.pack(at), 0)
        self._at, self._base = at + len(frame), len(frame)
        os.ftruncate(fd, self._at + len(_END))

    def _append(self, step: _Step) -> None:
        frame = _frame(_encode(step))
        os.pwrite(self.memfd.fileno(), frame + _END, self._at)
        self._at += len(frame)


def _frame(body: bytes) -> bytes:
    return _FRAME.pack(len(body), zlib.crc32(body)) + body


def _frames(data: bytes, at: int) -> Iterator[bytes]:
    """The whole ones from *at* on."""
    while at + _FRAME.size <= len(data):
        length, crc = _FRAME.unpack_from(data, at)
        body = data[at + _FRAME.size : at + _FRAME.size + length]
        if not length or len(body) < length or zlib.crc32(body) != crc:
            return
        yield body
        at += _FRAME.size + length


def _lease_label(entry: Entry, known: Entry) -> str | None:
    same = entry.lease is not None and known.lease is not None and entry.lease.id == known.lease.id
    label: str | None = known.lease.handle if same and known.lease is not None else None
    return label


def _keep(label: str, fd: int) -> None:
    try:
        store(label, [fd], poll=False, timeout=_PATIENCE)
    except (OSError, FdshareError) as error:
        log.error("the service manager has not taken %s: %s", label, error)


def _let_go(label: str) -> None:
    try:
        unstore(label, timeout=_PATIENCE)
    except (OSError, FdshareError) as error:
        log.error("the service manager still holds %s: %s", label, error)
