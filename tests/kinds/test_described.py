"""described: a Kind with its spec encoded, and the one descriptor that it needs."""

from __future__ import annotations

import os

import msgspec
import pytest

from fdshare.errors import KindMismatch
from fdshare.kernel.descriptor import Descriptor
from fdshare.kinds.described import kind_of, only


def test_a_spec_is_encoded_as_msgpack() -> None:
    kind = kind_of("mine", {"user": "ann"})
    assert kind.tag == "mine"
    assert msgspec.msgpack.decode(kind.spec) == {"user": "ann"}


def test_only_one_descriptor_will_do() -> None:
    with Descriptor(os.open("/dev/null", os.O_RDONLY)) as descriptor:
        assert only("mine", [descriptor]) is descriptor
        for wrong in ([], [descriptor, descriptor]):
            with pytest.raises(KindMismatch, match=f"{len(wrong)} descriptors instead of 1"):
                only("mine", wrong)
