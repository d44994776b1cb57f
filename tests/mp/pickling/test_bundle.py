"""Bundles: borrowed, owned, loaded, dropped; nothing is left behind."""

from __future__ import annotations

import gc
import os
import pickle
import socket
import weakref
from typing import Any

import pytest
from hanging import ClosedWithError

from fdshare.errors import AlreadyTaken, NoTransit
from fdshare.mp.backends import backend_of
from fdshare.mp.pickling.bundle import Bundle, Inline, Transit
from fdshare.mp.pickling.reducers import dumps
from mp import children
from mp.common import identity, open_now, shares_duplicates

FAMILY = backend_of("multiprocessing").FAMILY


@pytest.fixture(params=["multiprocessing", "multiprocess"])
def family(request: pytest.FixtureRequest) -> Any:
    return backend_of(request.param).FAMILY


def test_a_borrowed_bundle_duplicates_nothing(family: Any) -> None:
    with socket.socket() as sock:
        before = open_now()
        bundle = dumps(family, {"sock": sock})
        assert open_now() == before
        assert bundle.numbers == [sock.fileno()]


def test_what_has_no_descriptor_is_kept_by_none_that_waits() -> None:
    class Pickled:
        pass

    pickled = Pickled()
    there = weakref.ref(pickled)
    bundle = Bundle(b"", [], pickled)
    del pickled
    assert bundle.share().holders is there() is None


def test_an_owned_bundle_outlives_what_was_pickled(family: Any) -> None:
    left, right = socket.socketpair()
    with right:
        bundle = dumps(family, {"sock": left}).own()
        left.close()
        with bundle.load(family.loads)["sock"] as arrived:
            arrived.send(b"there")
        assert right.recv(9) == b"there"


@pytest.mark.parametrize("how", ["drop", "close"])
def test_a_bundle_that_nobody_loads_closes(family: Any, how: str) -> None:
    with socket.socket() as sock:
        before = open_now()
        bundle = dumps(family, [sock, {"again": sock}]).own()
        if how == "close":
            bundle.close()
            bundle.close()
        del bundle
        gc.collect()
        assert open_now() == before


@shares_duplicates
@pytest.mark.parametrize("how", ["drop", "close"])
def test_bundles_of_one_description_share_a_duplicate(family: Any, how: str) -> None:
    with socket.socket() as sock, sock.dup() as again:
        before = open_now()
        bundles = [dumps(family, [sock, again, number]).share() for number in range(9)]
        assert open_now() == before + 1
        assert {number for bundle in bundles for number in bundle.numbers} == {
            bundles[0].numbers[0]
        }
        envelope = dumps(family, ("job", bundles[:2]))
        while bundles:
            assert open_now() == before + 1
            bundle = bundles.pop()
            if how == "close":
                bundle.close()
                bundle.share()  # it has nothing more
            del bundle
        if how == "close":
            assert open_now() == before
            return
        # The envelope keeps its two.
        _, (one, other) = envelope.own().load(family.loads)
        for arrived in one, other:
            first, second, _ = arrived.load(family.loads)
            with first, second:
                assert identity(first) == identity(second) == identity(sock)
                assert first.fileno() != second.fileno()
        del envelope, one, other, arrived, first, second
        assert open_now() == before


def test_no_pickler_but_ours_takes_a_bundle(family: Any) -> None:
    with pytest.raises(NoTransit):
        pickle.dumps(dumps(family, "nothing"))


def test_what_the_pickle_does_not_claim_is_closed() -> None:
    with open(os.devnull) as file:
        bundle = dumps(FAMILY, file).own()
        extra = dumps(FAMILY, [file]).own()
        # Whatever close(2) says of what nobody gets, the object arrives.
        failing = [one.hand_to(ClosedWithError) for one in extra.owned or []]
        bundle.owned += failing  # type: ignore[operator]
        extra.owned = None
        before = open_now()
        bundle.load(FAMILY.loads).close()
        assert open_now() == before - 2


def test_a_load_that_fails_closes_what_it_had_built(family: Any) -> None:
    with open(os.devnull) as file, socket.socket() as sock:
        before = open_now()
        bundle = dumps(family, [file, children.Bomb(sock), sock]).own()
        with pytest.raises(RuntimeError, match="exploded"):
            bundle.load(family.loads)
        assert open_now() == before


def test_a_bundle_inside_another_pickle(family: Any) -> None:
    with socket.socket() as sock:
        inner = dumps(family, [sock])
        outer = dumps(family, ("job", inner)).own()
        word, arrived = outer.load(family.loads)
        assert word == "job"
        with arrived.load(family.loads)[0] as copy:
            assert identity(copy) == identity(sock)


def test_apart_from_its_descriptors_a_pickle_says_so() -> None:
    with socket.socket() as sock:
        for obj in (sock, [sock]):
            with pytest.raises(AlreadyTaken):
                pickle.loads(bytes(dumps(FAMILY, obj).data))


class Nested:
    """Decodes a bundle while it is decoded itself."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle

    def __reduce__(self) -> Any:
        return _load_nested, (self.bundle,)


def _load_nested(bundle: Bundle) -> Any:
    return bundle.load(FAMILY.loads)


def test_decoding_may_be_nested() -> None:
    with socket.socket() as one, socket.socket() as two:
        bundle = dumps(FAMILY, [one, Nested(dumps(FAMILY, [two])), one, two]).own()
        first, (second,), third, fourth = bundle.load(FAMILY.loads)
        assert first is third
        with first, second, fourth:
            assert [identity(s) for s in (first, second, fourth)] == [
                identity(s) for s in (one, two, two)
            ]


def test_inline_is_a_transit() -> None:
    transit: Transit = Inline()
    transit.commit()
    transit.rollback()
