"""kind: what nobody but the receiver reads."""

from __future__ import annotations

import msgspec
import pytest

from fdshare.protocol import messages as m
from fdshare.protocol.kind import Kind


def test_the_spec_is_carried_as_it_is() -> None:
    """Also where it is of a type that nobody here knows, in a form that we would not write."""
    spec = msgspec.Raw(b"\xdf\x00\x00\x00\x01\xa1x\xd2\x00\x00\x00\x01")  # {"x": 1}, the long way
    body = m.encode(m.Register("a", Kind("theirs", spec)))
    read = m.decode_request(body)
    assert isinstance(read, m.Register)
    assert read.kind.tag == "theirs"
    assert bytes(read.kind.spec) == bytes(spec)
    assert m.encode(read) == body


def test_it_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        Kind("fd", msgspec.Raw(b"\xc0")).tag = "other"  # type: ignore[misc]
