"""records: what goes through the journal comes out of it the same."""

from __future__ import annotations

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import given

from fdshare.protocol.kind import Kind
from fdshare.protocol.messages import Registrant
from fdshare.server.core.records import (
    Drop,
    Forget,
    Grant,
    Linger,
    Move,
    Put,
    Record,
    Settle,
    decode_record,
    encode_record,
)

names = st.text(min_size=1, max_size=10)
numbers = st.integers(0, 2**53)
times = st.floats(0, 1e12)
puts = st.builds(
    Put,
    name=names,
    generation=numbers,
    kind=st.builds(Kind, names, st.just(msgspec.Raw(b"\x81\xa1a\x01"))),
    count=st.integers(1, 250),
    registrant=st.builds(Registrant, numbers, numbers, numbers, names),
    at=times,
    lifetime=st.sampled_from(["server", "connection", "process"]),
    guarded=st.booleans(),
    expires=st.none() | times,
    grace=times,
    drop_on_hangup=st.booleans(),
    metadata=st.dictionaries(names, names, max_size=3),
)
changes = (
    puts
    | st.builds(Drop, names, numbers, st.sampled_from(["unregistered", "expired", "hung_up"]))
    | st.builds(Move, names, names, numbers)
    | st.builds(Grant, names, numbers, times)
    | st.builds(Settle, numbers, st.sampled_from(["taken", "returned"]))
    | st.builds(Linger, names, numbers, times)
    | st.builds(Forget, names)
)
records = st.builds(Record, st.lists(changes, max_size=4), names, numbers, st.binary(max_size=20))


@given(records)
def test_a_record_survives_the_journal(record: Record) -> None:
    letter = encode_record(record)
    arrived = decode_record(letter)
    assert encode_record(arrived) == letter
    assert [type(change) for change in arrived.changes] == [type(c) for c in record.changes]
    for before, after in zip(record.changes, arrived.changes, strict=True):
        if not isinstance(before, Put):  # whose spec is bytes on one side, a view on the other
            assert before == after


@given(puts)
def test_a_put_draws_its_handles_and_its_guard(put: Put) -> None:
    assert put.draws == put.count + (1 if put.guarded else 0)


def test_what_else_draws_a_handle() -> None:
    draws = {type(c): c.draws for c in (Grant("a", 1, 0.0), Drop("a", 1, "expired"), Forget("s"))}
    assert draws == {Grant: 1, Drop: 0, Forget: 0}


@pytest.mark.parametrize(
    "letter",
    [b"", b"\xc0", encode_record(Record([]))[:-1], encode_record(Record([])) + b"\0"],
)
def test_what_is_no_record_is_refused(letter: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        decode_record(letter)
