"""Record: one atomic change of the table, as data. It is decided, journaled, and then applied.

The server and its keeper have a `Table` each and apply the same records in the same order, so both
hold the same. Times are of CLOCK_MONOTONIC, which is the same for both.
"""

from __future__ import annotations

from typing import Any, Final, Literal, TypeAlias

import msgspec

from fdshare.protocol.messages import EventKind, Kind, Lifetime, Registrant

__all__ = [
    "Change",
    "Drop",
    "Forget",
    "Grant",
    "Linger",
    "Move",
    "Put",
    "Record",
    "Settle",
    "decode_record",
    "encode_record",
]


class _Change(msgspec.Struct, tag_field="type", omit_defaults=True):
    @property
    def draws(self) -> int:
        """How many of the record's handles are its own."""
        return 0

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)


class Put(_Change, tag="put"):
    """An entry appears under *name*, and replaces the one that was there, if any.

    It draws *count* handles, and if it is *guarded* one more, its guard: a lifeline or a pidfd
    whose end is the entry's end.
    """

    name: str
    generation: int
    kind: Kind
    count: int
    registrant: Registrant
    at: float
    lifetime: Lifetime = "server"
    guarded: bool = False
    expires: float | None = None
    grace: float = 0.0
    drop_on_hangup: bool = False
    metadata: dict[str, str] = {}

    @property
    def draws(self) -> int:
        return self.count + self.guarded


class Drop(_Change, tag="drop"):
    """The entry is removed; *event* says why."""

    name: str
    generation: int
    event: EventKind


class Move(_Change, tag="move"):
    old: str
    new: str
    generation: int


class Grant(_Change, tag="grant"):
    """The entry is leased to a taker. It draws one handle: our end of the lease."""

    name: str
    lease: int
    at: float
    uid: int = 0  # the taker's, against which the lease counts

    @property
    def draws(self) -> int:
        return 1


class Settle(_Change, tag="settle"):
    """The lease ends: the entry is removed, or visible under its name again."""

    lease: int
    outcome: Literal["taken", "returned"]


class Linger(_Change, tag="linger"):
    """The owner of the entry is gone: its guard is closed, and the entry expires after its
    grace."""

    name: str
    generation: int
    expires: float


class Forget(_Change, tag="forget"):
    """The answers for this session are forgotten: its client repeats no request any more."""

    session: str


Change: TypeAlias = Put | Drop | Move | Grant | Settle | Linger | Forget


class Record(msgspec.Struct, tag="record", frozen=True, omit_defaults=True):
    """All of its changes are applied, or none. (*session*, *id*) is the request that asked for it,
    and *reply* the body of its answer: a repeat of the request is sent that, and not carried
    out."""

    changes: list[Change]
    session: str = ""
    id: int = 0
    reply: bytes = b""


_encoder: Final = msgspec.msgpack.Encoder()
_decoder: Final = msgspec.msgpack.Decoder(Record)

encode_record = _encoder.encode
decode_record = _decoder.decode
