"""FdStore: the table in a service manager's file descriptor store, where it outlives both halves.

systemd keeps what a service sends with FDSTORE=1 and passes it to the next start (sd_notify(3),
systemd.service(5) FileDescriptorStoreMax=). It keeps a name beside each descriptor and nothing
else, so the table itself is stored, too.

    fdshare-table   a memfd (table_file.py)
    fdshare-page    the memfd in which followers look (loop/page.py)
    .k3F0, .k3F1 ...   one open file description each (labels.py)

A record is in the store before its client hears "ok", unless a write fails: then the store is stale
until the whole table could be written, which is soon tried. A successor compares the memfd with the
table that it was given.

Two things systemd does without a word. It keeps one descriptor of each open file description and
drops a second: so entries that share a description share its label, and the memfd says which. And
it drops what is beyond its limit: so what it holds is counted here. What finds no room is missing,
which `info` and `stats` tell, and is offered again when there is room.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

from fdshare.activation import store, unstore
from fdshare.errors import FdshareError
from fdshare.kernel.descriptor import Descriptor
from fdshare.kernel.memfd import create_memfd
from fdshare.kernel.open_file import Descriptions
from fdshare.protocol.messages import StoreStats
from fdshare.server.core.image import Image, image_of, table_of
from fdshare.server.core.records import Put, Record
from fdshare.server.core.table import Entry, Table
from fdshare.server.failover.labels import BUDGET, PAGE, TABLE, Labels, new_prefix, price
from fdshare.server.failover.table_file import Base, Step, Stored, TableFile, UnreadableTable
from fdshare.server.loop.closing import UNKNOWN, Handle, close_within

__all__ = ["FdStore", "let_go"]

log = logging.getLogger("fdshare.server")

_PATIENCE: Final = 1.0  # seconds for a service manager that does not read ...
_PAUSE: Final = 10.0  # ... which is then left alone for so many


class _Use:
    """One handle of the table: the label that it shares, and its descriptor, where it is open."""

    __slots__ = ("fd", "label")

    def __init__(self, label: str, fd: int = -1) -> None:
        self.label = label
        self.fd = fd


class FdStore:
    """What the service manager holds: a table of labels, and the memfd that says so."""

    def __init__(
        self, memfd: Descriptor, limit: int | None = None, page: Descriptor | None = None
    ) -> None:
        """Takes *memfd* and *page* over. *limit*: how many descriptors the service manager holds at
        most, these two included; None where it is not known. Raises: UnreadableTable; both are
        still the caller's."""
        self.memfd = memfd
        self.page = page
        self.limit = limit
        self.epoch = ""
        self.held = Table()
        self._prefix = new_prefix()
        self._uses: dict[str, list[_Use]] = {}
        self._missing: dict[str, None] = {}  # in the order in which they are offered
        self._leftover: dict[str, None] = {}  # nobody uses them, but they may be held
        self._gone: list[str] = []  # they were let go, which is not written yet
        self._spent = 0  # bytes of LISTEN_FDNAMES
        self.told = 0  # how often the service manager was told anything
        self._silent_until = 0.0
        self.stale = False  # a write failed: nothing is written until the table is there anew
        self._file = TableFile(memfd)
        try:
            self._load()
        except UnreadableTable:
            raise
        except Exception as error:  # such as KeyError, of a record that does not follow
            raise UnreadableTable(f"reading it raises {error!r}") from error
        self._labels = Labels(self._prefix, [*self._uses, *self._leftover])
        self._descriptions = Descriptions()
        self._label_of: dict[int, str] = {}  # descriptor -> label
        self._clean: set[str] = set()  # labels under which certainly nothing is held

    @classmethod
    def new(cls, epoch: str, limit: int | None = None) -> FdStore:
        """An empty store, whose memfd the service manager holds. The caller owns the result."""
        made = cls(Descriptor(create_memfd(TABLE)), limit)
        made.epoch = epoch
        made._rewrite()
        if limit == 0:
            log.warning("the service manager holds no descriptors: FileDescriptorStoreMax= is 0")
        let_go(TABLE)
        made._keep_table()
        return made

    # After the end of both halves: what was passed back.

    def restore(self, passed: Mapping[str, Sequence[Descriptor]]) -> Table:
        """The table, with handles of the descriptors *passed* back by label. Those that it does not
        refer to are closed, and the service manager is told to let go of them. Takes *passed*
        over."""
        found: dict[str, Descriptor] = {}
        unused: list[Descriptor] = []
        for label, descriptors in passed.items():
            if len(descriptors) == 1:
                found[label] = descriptors[0]
                continue
            log.error("%d descriptors came back as %s, none is used", len(descriptors), label)
            unused += descriptors
            let_go(label)
        image, uses = image_of(self.held)
        labels = self._take_from(image, [use.label for use in uses], found.keys())
        for label in found.keys() - set(labels):
            unused.append(found[label])
            let_go(label)
        close_within(1.0, [Handle(descriptor.detach(), UNKNOWN) for descriptor in unused])
        first: dict[str, Handle] = {}
        handles = []
        for label in labels:
            if label in first:  # another entry shares the open file description
                handles.append(Handle(os.dup(first[label].fd)))
            else:
                first[label] = Handle(found[label].detach())
                handles.append(first[label])
        return table_of(image, handles)

    def _take_from(self, image: Image, labels: list[str], found: Collection[str]) -> list[str]:
        """Takes from *image*, which draws *labels*, what needs others than those *found*; the
        labels that are left."""
        kept: list[str] = []
        changes = []
        lost: set[str] = set()
        draw = iter(labels)
        for change in image.record.changes:
            drawn = [next(draw) for _ in range(change.draws)]
            if not all(label in found for label in drawn):
                # Without our end of its lease, a taker cannot confirm: the entry is back.
                if isinstance(change, Put):
                    lost.add(change.name)
                    log.error("%r is lost: it was not in the store", change.name)
            elif getattr(change, "name", "") not in lost:
                changes.append(change)
                kept += drawn
        image.record = Record(changes)
        image.fetches = {name: n for name, n in image.fetches.items() if name not in lost}
        return kept

    # While serving.

    def reconcile(self, table: Table) -> None:
        """Makes the store hold what *table* does: a predecessor may have died while it wrote, or a
        write may have failed. Never fails; it is `stale` then."""
        with self._noticing():
            self._reconcile(table)
            self.stale = False

    @contextmanager
    def _noticing(self) -> Iterator[None]:
        """Whatever a write fails for is in the log, and makes the store stale: what it was about is
        done, and there may be room for it later."""
        try:
            yield
        except Exception:
            self.stale = True
            log.exception("the store is not up to date")

    def _reconcile(self, table: Table) -> None:
        # After a write that failed, some of those that are noted may be closed.
        self._descriptions, self._label_of = Descriptions(), {}
        if not self._descriptions.works:
            log.warning("kcmp(2) is refused: an open file under two names may be stored but once")
        known = self._known_labels(table)
        for label in self._uses.keys() - set(known):
            if label not in self._missing:
                self._leftover[label] = None
            self._missing.pop(label, None)
        self._uses = {}
        image, handles = image_of(table)
        uses = [_Use(label, handle.fd) for label, handle in zip(known, handles, strict=True)]
        for use in uses:
            if use.label:
                self._add(use)
        for use in uses:
            if not use.label:
                self._label(use)
        self.held = table_of(image, list(uses))
        self._rewrite()
        self._keep_table()  # once more, which does no harm: the first time it may not have read
        self._offer()

    def record(self, record: Record, fds: Sequence[int]) -> None:
        """*record* and the *fds* that it draws are in the store when this returns, as far as there
        is room, unless it is `stale`. *fds* are borrowed until a record lets go of them. Never
        fails."""
        if not self.stale:
            with self._noticing():
                self._record(record, fds)

    def _record(self, record: Record, fds: Sequence[int]) -> None:
        uses = [_Use("", fd) for fd in fds]
        for use in uses:
            self._label(use)
        labels = [use.label for use in uses]
        missing = [label for label in labels if label in self._missing]
        self._append(Step(record, labels, missing, self._gone))
        for use in self.held.apply(record, list(uses)).freed:
            self._remove(use)
        self._offer()
        for change in record.changes:
            if isinstance(change, Put) and self.stored(change.name) is False:
                log.warning("%r is not in the store, which holds %d", change.name, self._count())
        if self._file.full:
            self._rewrite()

    def try_again(self, limit: int | None, held: int | None) -> None:
        """Offers what is missing again. The *limit* may be another now, and the service manager may
        have dropped some when it changed: *held* is how many it has, None where it does not say."""
        self.limit = limit
        self._silent_until = 0.0
        if not self.stale:
            with self._noticing():
                if held is not None and held != self._count():
                    self._start_over()
                self._offer()

    def _start_over(self) -> None:
        """Has the service manager let go of all that it may hold, so that all of it is offered
        again."""
        log.warning("the service manager does not hold what it did, and is given all of it again")
        for label in list(self._uses):
            if label not in self._missing and self._tell(f"let go of {label}", unstore, label):
                self._clean.add(label)
                self._spent -= price(label)
                self._missing[label] = None
        self._rewrite()
        self._keep_table()

    # What is asked of it.

    def stored(self, name: str) -> bool | None:
        """Whether the entry would be back after the end of both halves; False while the store is
        stale. None: there is no entry."""
        if self.stale:
            return False
        entry = self.held.entries.get(name)
        if entry is None:
            return None
        uses = entry.handles if entry.guard is None else (*entry.handles, entry.guard)
        return all(use.label not in self._missing for use in uses)

    def stats(self) -> StoreStats:
        names = self.held.entries if self._missing or self.stale else ()
        return StoreStats(self._count(), self.limit, sum(not self.stored(name) for name in names))

    def _count(self) -> int:
        """How many descriptors the service manager holds; one is the table's, one the page's."""
        own = 1 if self.page is None else 2
        labels = len(self._uses) - len(self._missing) + len(self._leftover)
        return labels + (own if self.limit is None else min(self.limit, own))

    # Labels.

    def _known_labels(self, table: Table) -> list[str]:
        """For each handle of *table*, in the order of its image, the label that it has; empty where
        the store does not know it."""
        labels: list[str] = []
        for entry in table.entries.values():
            known = self.held.entries.get(entry.name)
            if known is None or known.generation != entry.generation:
                labels += ["" for _ in entry.all_handles()]
                continue
            labels += [use.label for use in known.handles]
            if entry.guard is not None:
                labels.append("" if known.guard is None else known.guard.label)
            if entry.lease is not None:
                labels.append(_lease_label(entry, known))
        return labels

    def _label(self, use: _Use) -> None:
        """Gives *use* the label of its open file description; if that has none, a new one, and the
        service manager the descriptor."""
        same = self._descriptions.find(use.fd)
        if same is not None:
            use.label = self._label_of[same]
            self._add(use)
            return
        use.label = self._labels.take()
        room = self._has_room(use.label)
        self._add(use)
        if not room or not self._keep(use.label, use.fd):
            self._missing[use.label] = None

    def _add(self, use: _Use) -> None:
        uses = self._uses.setdefault(use.label, [])
        if not uses:
            self._descriptions.add(use.fd)
        uses.append(use)
        self._label_of[use.fd] = use.label

    def _remove(self, use: _Use) -> None:
        uses = self._uses[use.label]
        uses.remove(use)
        del self._label_of[use.fd]
        self._descriptions.replace(use.fd, uses[0].fd if uses else None)
        if uses:
            return
        del self._uses[use.label]
        if use.label in self._missing:
            del self._missing[use.label]
            self._labels.give_back(use.label)
        else:
            self._leftover[use.label] = None

    def _has_room(self, label: str) -> bool:
        if self._leftover:  # one of them may be of this very open file description
            return False
        within = self.limit is None or self._count() < self.limit
        return within and self._spent + price(label) <= BUDGET

    # What the service manager is told.

    def _offer(self) -> None:
        """Has the service manager let go of what nobody uses, and offers it what is missing."""
        for label in list(self._leftover):
            if not self._tell(f"let go of {label}", unstore, label):
                return
            del self._leftover[label]
            self._spent -= price(label)
            self._gone.append(label)
            self._labels.give_back(label)
            self._clean.add(label)
        stored = []
        for label in list(self._missing):
            if not self._has_room(label) or not self._keep(label, self._uses[label][0].fd):
                break
            del self._missing[label]
            stored.append(label)
        if stored:
            self._append(Stored(stored, self._gone))
            log.info(
                "the service manager holds %d descriptors that it had no room for", len(stored)
            )

    def _keep_table(self) -> None:
        self._tell(f"keep {TABLE}", store, TABLE, [self.memfd.fileno()], poll=False)
        if self.page is not None:
            self._tell(f"keep {PAGE}", store, PAGE, [self.page.fileno()], poll=False)

    def _keep(self, label: str, fd: int) -> bool:
        # A predecessor may have died before it wrote what it had stored, or had let go of what it
        # wrote.
        if label not in self._clean and not self._tell(f"let go of {label}", unstore, label):
            return False
        self._clean.add(label)
        if not self._tell(f"keep {label}", store, label, [fd], poll=False):
            return False
        self._clean.discard(label)
        self._spent += price(label)
        return True

    def _tell(self, what: str, tell: Callable[..., bool], *args: Any, **options: Any) -> bool:
        """True if *tell* went to the service manager. One that does not read is given a pause."""
        if time.monotonic() < self._silent_until:
            return False
        self.told += 1
        try:
            tell(*args, timeout=_PATIENCE, **options)
        except (OSError, FdshareError) as error:
            self._silent_until = time.monotonic() + _PAUSE
            log.error("the service manager was not told to %s: %s", what, error)
            return False
        return True

    # The memfd.

    def _load(self) -> None:
        for frame in self._file.read():
            if not isinstance(frame, Base):
                for label in frame.gone:
                    self._leftover.pop(label, None)
            if isinstance(frame, Base):
                self.epoch, self._prefix = frame.epoch, frame.prefix
                uses = [_Use(label) for label in frame.labels]
                self.held = table_of(frame.image, list(uses))
                self._missing = dict.fromkeys(frame.missing)
                self._leftover = dict.fromkeys(frame.leftover)
                self._note(uses, ())
            elif isinstance(frame, Step):
                uses = [_Use(label) for label in frame.labels]
                self._missing.update(dict.fromkeys(frame.missing))
                self._note(uses, self.held.apply(frame.record, list(uses)).freed)
            else:
                for label in frame.labels:
                    self._missing.pop(label, None)
        held = [label for label in self._uses if label not in self._missing]
        self._spent = sum(map(price, (*held, *self._leftover)))

    def _note(self, drawn: Iterable[_Use], closed: Iterable[_Use]) -> None:
        """Follows who uses a label. What nobody uses any more may be held until a frame says that
        it is gone: the service manager may not have read, or the writer may have died before it
        told it."""
        for use in drawn:
            self._leftover.pop(use.label, None)  # what is used must never be let go
            self._uses.setdefault(use.label, []).append(use)
        for use in closed:
            uses = self._uses[use.label]
            uses.remove(use)
            if not uses:
                del self._uses[use.label]
                if use.label in self._missing:
                    del self._missing[use.label]
                else:
                    self._leftover[use.label] = None

    def _rewrite(self) -> None:
        image, uses = image_of(self.held)
        labels = [use.label for use in uses]
        missing, leftover = list(self._missing), list(self._leftover)
        self._file.rewrite(Base(self.epoch, self._prefix, image, labels, missing, leftover))

    def _append(self, frame: Step | Stored) -> None:
        self._file.append(frame)
        self._gone = []


def let_go(label: str) -> None:
    """Tells the service manager to close what it holds as *label*. Never fails."""
    try:
        unstore(label, timeout=_PATIENCE)
    except (OSError, FdshareError) as error:
        log.error("the service manager still holds %s: %s", label, error)


def _lease_label(entry: Entry, known: Entry) -> str:
    """The label of the lease of *entry*; empty where *known* has none, or another."""
    same = entry.lease is not None and known.lease is not None and entry.lease.id == known.lease.id
    label: str = known.lease.handle.label if same and known.lease is not None else ""
    return label
