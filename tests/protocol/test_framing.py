"""The framing automaton: every cut, every place for descriptors, every count that lies."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fdshare.errors import DescriptorLimit, ProtocolError, VersionMismatch
from fdshare.protocol.framing import (
    HEADER,
    MAX_FRAME,
    MAX_FRAME_DESCRIPTORS,
    Frame,
    Receiver,
    header,
)
from fdshare.protocol.messages import VERSION


def frame(id: int, body: bytes, descriptors: list[int] | tuple[()] = ()) -> bytes:
    return header(len(body), len(descriptors), id) + body


LOST = DescriptorLimit(24, "RLIMIT_NOFILE", 10, None, "receiver")

# What a peer sends: (id, body, descriptors), one sendmsg each.
MESSAGES = [
    (1, b"one", []),
    (2, b"two", [10]),
    (3, b"", [20, 21]),
    (4, b"", []),
    (0, b"event", [30, 31, 32]),
    (0xFFFFFFFF, b"x" * 300, []),
    (7, b"y" * 300, [40]),
]


def frames_of(receiver: Receiver[int], reads: list[tuple[bytes, list[int]]]) -> list[Frame[int]]:
    found = []
    for data, descriptors in reads:
        found += receiver.feed(data, descriptors)
    return found


def seen(frames: list[Frame[int]]) -> list[tuple[int, bytes, list[int]]]:
    assert all(frame.lost is None for frame in frames)
    return [(frame.id, frame.body, frame.descriptors) for frame in frames]


def test_the_header_is_the_documented_one() -> None:
    assert HEADER.size == 12
    assert header(5, 2, 7) == bytes([0, 0, 0, 5, 0, 2, VERSION, 0, 0, 0, 0, 7])


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: f"{m[0]}-{len(m[1])}-{len(m[2])}")
def test_whole(message: tuple[int, bytes, list[int]]) -> None:
    id, body, descriptors = message
    receiver: Receiver[int] = Receiver()
    assert seen(receiver.feed(frame(id, body, descriptors), descriptors)) == [message]
    assert receiver.idle
    assert receiver.drain() == []


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: f"{m[0]}-{len(m[1])}-{len(m[2])}")
@pytest.mark.parametrize("trailing", [b"", frame(9, b"next")])
def test_split_at_every_byte(message: tuple[int, bytes, list[int]], trailing: bytes) -> None:
    """The descriptors come with the first byte, wherever the bytes are cut."""
    id, body, descriptors = message
    data = frame(id, body, descriptors) + trailing
    for cut in range(1, len(data)):
        receiver: Receiver[int] = Receiver()
        found = frames_of(receiver, [(data[:cut], descriptors), (data[cut:], [])])
        expected = [message] + ([(9, b"next", [])] if trailing else [])
        assert seen(found) == expected, cut
        assert receiver.failure is None
        assert receiver.idle


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: f"{m[0]}-{len(m[1])}-{len(m[2])}")
def test_byte_by_byte(message: tuple[int, bytes, list[int]]) -> None:
    id, body, descriptors = message
    data = frame(id, body, descriptors)
    receiver: Receiver[int] = Receiver()
    found = []
    for index in range(len(data)):
        assert receiver.idle == (index == 0)
        found += receiver.feed(data[index : index + 1], descriptors if not index else [])
    assert seen(found) == [message]
    assert receiver.idle


def merged_reads(messages: list[tuple[int, bytes, list[int]]]) -> Iterator[tuple[bytes, list[int]]]:
    """As the kernel merges: bytes before a descriptor-bearing message go with it, none after."""
    data, descriptors = b"", []
    for id, body, mine in messages:
        if descriptors:
            yield data, descriptors
            data, descriptors = b"", []
        data += frame(id, body, mine)
        descriptors = mine
    yield data, descriptors


def test_merged_as_the_kernel_merges() -> None:
    receiver: Receiver[int] = Receiver()
    assert seen(frames_of(receiver, list(merged_reads(MESSAGES)))) == MESSAGES
    assert receiver.idle


messages = st.lists(
    st.tuples(
        st.integers(0, 0xFFFFFFFF),
        st.binary(max_size=40),
        st.integers(0, 4),
    ),
    max_size=8,
)


@settings(max_examples=50)
@given(messages, st.data())
def test_any_cut_of_any_stream(shapes: list[tuple[int, bytes, int]], data: st.DataObject) -> None:
    """Whatever a reader's buffer cuts out of whatever the kernel merged."""
    numbers = iter(range(1000))
    sent = [(id, body, [next(numbers) for _ in range(n)]) for id, body, n in shapes]
    receiver: Receiver[int] = Receiver()
    found = []
    for merged, descriptors in merged_reads(sent) if sent else ():
        # The kernel gives the descriptors with the part that has the first byte of their message;
        # a read that ends before it has none of them.
        start = 0
        if descriptors:
            (last,) = [message for message in sent if message[2] == descriptors]
            start = len(merged) - len(frame(*last))
        at = 0
        while at < len(merged):
            end = data.draw(st.integers(at + 1, len(merged)), label="cut")
            with_it = bool(descriptors) and at <= start < end
            found += receiver.feed(merged[at:end], descriptors if with_it else [])
            assert receiver.failure is None
            at = end
    assert seen(found) == sent
    assert receiver.idle
    assert receiver.drain() == []


@given(st.lists(st.tuples(st.binary(max_size=60), st.lists(st.integers(), max_size=3)), max_size=6))
def test_garbage_never_raises_and_loses_nothing(reads: list[tuple[bytes, list[int]]]) -> None:
    receiver: Receiver[int] = Receiver(max_frame=50)
    given_in: list[int] = []
    got: list[int] = []
    for data, descriptors in reads:
        for found in receiver.feed(data, list(descriptors)):
            got += found.descriptors
        given_in += descriptors
        if receiver.failure is not None:
            break
    assert got + receiver.drain() == given_in
    assert receiver.drain() == []


# Counts that lie


@pytest.mark.parametrize(("announced", "came"), [(2, 1), (2, 0), (1, 0), (253, 252)])
def test_fewer_than_announced(announced: int, came: int) -> None:
    receiver: Receiver[int] = Receiver()
    data = header(4, announced, 1) + b"body"
    assert receiver.feed(data, list(range(came))) == []
    assert isinstance(receiver.failure, ProtocolError)
    assert str(announced) in str(receiver.failure)
    assert receiver.drain() == list(range(came))


@pytest.mark.parametrize(("announced", "came"), [(0, 1), (1, 2), (2, 3), (252, 253)])
def test_more_than_announced(announced: int, came: int) -> None:
    receiver: Receiver[int] = Receiver()
    data = frame(9, b"before") + header(4, announced, 1) + b"body"
    assert [each.id for each in receiver.feed(data, list(range(came)))] == [9]
    assert isinstance(receiver.failure, ProtocolError)
    assert receiver.drain() == list(range(came))


def test_more_than_announced_is_known_before_the_body_is_there() -> None:
    receiver: Receiver[int] = Receiver()
    assert receiver.feed(header(1000, 1, 1), [1, 2]) == []
    assert isinstance(receiver.failure, ProtocolError)
    assert receiver.drain() == [1, 2]


def test_descriptors_in_the_middle_of_a_frame_that_announced_none() -> None:
    receiver: Receiver[int] = Receiver()
    data = frame(1, b"body")
    assert receiver.feed(data[:14]) == []
    found = receiver.feed(data[14:], [5])
    assert receiver.failure is not None
    assert [d for each in found for d in each.descriptors] + receiver.drain() == [5]


def test_frames_before_the_failure_are_good() -> None:
    receiver: Receiver[int] = Receiver()
    good, bad = frame(1, b"good", [7]), header(4, 3, 2) + b"body"
    found = receiver.feed(good + bad, [7, 8])
    assert seen(found) == [(1, b"good", [7])]
    assert receiver.failure is not None
    assert receiver.drain() == [8]


# Descriptors that the kernel dropped


def test_lost_descriptors_are_told_by_their_frame() -> None:
    receiver: Receiver[int] = Receiver()
    data = frame(1, b"first") + frame(2, b"second", [1, 2])
    first, second = receiver.feed(data, [], LOST)
    assert (first.lost, second.lost) == (None, LOST)
    assert (second.id, second.body, second.descriptors) == (2, b"second", [])
    assert receiver.failure is None
    assert seen(receiver.feed(frame(3, b"third", [3]), [3])) == [(3, b"third", [3])]


def test_lost_descriptors_of_a_frame_that_comes_in_parts() -> None:
    data = frame(1, b"body", [1])
    for cut in range(1, len(data)):
        receiver: Receiver[int] = Receiver()
        assert receiver.feed(data[:cut], [], LOST) == []
        (found,) = receiver.feed(data[cut:])
        assert found.lost is LOST
        assert receiver.failure is None


def test_lost_descriptors_are_of_the_frame_whose_they_were() -> None:
    """Whatever came in the next read, behind the rest of it."""
    first, second = frame(1, b"first", [1]), frame(2, b"second", [2])
    for cut in range(1, len(first)):
        receiver: Receiver[int] = Receiver()
        assert receiver.feed(first[:cut], [], LOST) == []
        assert receiver.waiting() == []
        found, after = receiver.feed(first[cut:] + second, [2])
        assert (found.id, found.lost, found.descriptors) == (1, LOST, [])
        assert seen([after]) == [(2, b"second", [2])]
        assert receiver.failure is None
        assert receiver.drain() == []


def test_lost_descriptors_of_each_of_two_reads() -> None:
    first, second = frame(1, b"first", [1]), frame(2, b"second", [2])
    other = DescriptorLimit(24, "RLIMIT_NOFILE", 11, None, "receiver")
    receiver: Receiver[int] = Receiver()
    assert receiver.feed(first[:14], [], LOST) == []
    assert [each.lost for each in receiver.feed(first[14:] + second, [], other)] == [LOST, other]
    assert receiver.failure is None


def test_lost_descriptors_that_were_not_announced() -> None:
    for data in (frame(1, b"body"), frame(1, b"body")[:14]):
        receiver: Receiver[int] = Receiver()
        receiver.feed(data, [], LOST)
        assert isinstance(receiver.failure, ProtocolError)
        assert receiver.drain() == []


def test_some_came_and_others_were_lost_of_one_frame() -> None:
    """They were sent with two messages, which no sender may do."""
    data = frame(1, b"body", [1, 2])
    receiver: Receiver[int] = Receiver()
    assert receiver.feed(data[:14], [1]) == []
    assert receiver.feed(data[14:], [], LOST) == []
    assert isinstance(receiver.failure, ProtocolError)
    assert receiver.drain() == [1]


# Headers that cannot be


@pytest.mark.parametrize("version", [0, VERSION + 1, 255])
def test_another_version(version: int) -> None:
    receiver: Receiver[int] = Receiver()
    assert receiver.feed(HEADER.pack(0, 0, version, 0, 1)) == []
    assert isinstance(receiver.failure, VersionMismatch)
    assert (receiver.failure.theirs, receiver.failure.ours) == (version, VERSION)


@pytest.mark.parametrize(
    "bad",
    [
        HEADER.pack(MAX_FRAME + 1, 0, VERSION, 0, 1),
        HEADER.pack(0xFFFFFFFF, 0, VERSION, 0, 1),
        HEADER.pack(0, MAX_FRAME_DESCRIPTORS + 1, VERSION, 0, 1),
        HEADER.pack(0, 0xFFFF, VERSION, 0, 1),
        HEADER.pack(0, 0, VERSION, 1, 1),
    ],
    ids=["long", "longest", "254", "65535", "reserved"],
)
def test_beyond_the_limits(bad: bytes) -> None:
    for at_once in (True, False):
        receiver: Receiver[int] = Receiver()
        reads = [bad] if at_once else [bad[i : i + 1] for i in range(len(bad))]
        for read in reads:
            assert receiver.feed(read) == []
        assert isinstance(receiver.failure, ProtocolError)


def test_at_the_limits() -> None:
    receiver: Receiver[int] = Receiver()
    most = list(range(MAX_FRAME_DESCRIPTORS))
    body = bytes(MAX_FRAME)
    assert seen(receiver.feed(frame(1, body, most), most)) == [(1, body, most)]
    data = frame(1, body, most)
    assert receiver.feed(data[:100], most) == []
    for at in range(100, len(data), 1 << 16):
        found = receiver.feed(data[at : at + (1 << 16)])
    assert seen(found) == [(1, body, most)]


@pytest.mark.parametrize("at_once", [True, False])
def test_the_first_frame_has_a_limit_of_its_own(at_once: bool) -> None:
    def feed(receiver: Receiver[int], data: bytes) -> list[tuple[int, bytes, list[int]]]:
        reads = [data] if at_once else [data[i : i + 1] for i in range(len(data))]
        return seen(frames_of(receiver, [(read, []) for read in reads]))

    receiver: Receiver[int] = Receiver(20, 10)
    first, second = frame(1, bytes(10)), frame(2, bytes(20))
    assert feed(receiver, first + second) == [(1, bytes(10), []), (2, bytes(20), [])]
    assert feed(receiver, second) == [(2, bytes(20), [])]
    assert feed(receiver, frame(3, bytes(21))) == []
    assert receiver.failure is not None
    receiver = Receiver(20, 10)
    assert feed(receiver, frame(1, bytes(11))) == []
    assert receiver.failure is not None


def test_a_failure_does_not_keep_what_was_received() -> None:
    """An exception keeps the frames it went through, and these keep the receiver and its bytes."""
    receiver: Receiver[int] = Receiver()
    receiver.feed(b"garbage that is no header")
    there = weakref.ref(receiver)
    gc.disable()
    try:
        del receiver
        assert there() is None
    finally:
        gc.enable()


def test_the_frames_outlive_the_buffer() -> None:
    """A reader uses one buffer again and again."""
    receiver: Receiver[int] = Receiver()
    buffer = bytearray(frame(1, b"first") + frame(2, b"second")[:15])
    (first,) = receiver.feed(memoryview(buffer))
    buffer[:] = bytes(len(buffer))
    (second,) = receiver.feed(frame(2, b"second")[15:])
    assert (first.body, second.body) == (b"first", b"second")


def test_a_trickle_costs_no_more_than_a_flood() -> None:
    """A long frame in small pieces is not copied for every piece."""
    receiver: Receiver[int] = Receiver()
    data = frame(1, bytes(MAX_FRAME))
    found = []
    for at in range(0, len(data), 64):  # 16 Ki pieces; quadratic copying would take minutes
        found += receiver.feed(data[at : at + 64])
    assert len(found) == 1
