"""Image: everything that a table holds, as data that can be stored and sent. Pure.

Its handles go beside it, in the order in which its record draws them: what they are elsewhere, the
numbers of inherited descriptors or labels in a store, only the caller knows.
"""

from __future__ import annotations

from collections import OrderedDict

import msgspec

from fdshare.server.core.records import Change, Grant, Record
from fdshare.server.core.table import Handle, Table

__all__ = ["Image", "image_of", "table_of"]


class Image(msgspec.Struct):
    """A table without its handles."""

    record: Record  # the Puts and Grants that make its entries and leases in an empty table
    answers: dict[str, dict[int, bytes]]
    fetches: dict[str, int]
    generation: int
    serial: int
    last_lease: int


def image_of(table: Table) -> tuple[Image, list[Handle]]:
    """The image of *table*, and its handles, which stay the table's."""
    changes: list[Change] = []
    handles: list[Handle] = []
    for entry in table.entries.values():
        put = msgspec.structs.replace(
            entry.put,
            name=entry.name,
            generation=entry.generation,
            expires=entry.expires,
            guarded=entry.guard is not None,
        )
        changes.append(put)
        if entry.lease is not None:
            changes.append(Grant(entry.name, entry.lease.id, entry.lease.at, entry.lease.uid))
        handles += entry.all_handles()
    image = Image(
        record=Record(changes),
        answers={session: dict(kept) for session, kept in table.answers.items()},
        fetches={name: entry.fetches for name, entry in table.entries.items()},
        generation=table.generation,
        serial=table.serial,
        last_lease=table.last_lease,
    )
    return image, handles


def table_of(image: Image, handles: list[Handle]) -> Table:
    """A table of *handles* that is equal to the one whose image this is. It owns the handles."""
    table = Table()
    table.apply(image.record, handles)
    table.leases = dict(sorted(table.leases.items()))  # the oldest first, as they were made
    table.answers = {session: OrderedDict(kept) for session, kept in image.answers.items()}
    for name, count in image.fetches.items():
        table.entries[name].fetches = count
    table.generation, table.serial = image.generation, image.serial
    table.last_lease = image.last_lease
    return table
