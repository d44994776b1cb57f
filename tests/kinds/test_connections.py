"""connections: what arrives is a Connection of the same class."""

from __future__ import annotations

import multiprocessing.connection
import os
from typing import Any

import msgspec
import multiprocess.connection
import pytest

from fdshare.errors import KindMismatch, UnsupportedKind
from fdshare.kernel.descriptor import Descriptor
from fdshare.kinds import Kind, rebuild
from fdshare.kinds.connections import ConnectionSpec, describe_connection
from kinds.common import through


@pytest.mark.parametrize("duplex", [True, False])
@pytest.mark.parametrize("module", [multiprocessing, multiprocess], ids=lambda m: m.__name__)
def test_a_connection_of_either_family(module: Any, duplex: bool) -> None:
    reader, writer = module.connection.Pipe(duplex)
    with reader, writer, through(reader) as reader2, through(writer) as writer2:
        assert type(reader2) is type(reader)
        assert (reader2.readable, reader2.writable) == (reader.readable, reader.writable)
        writer2.send({"a": 1})
        assert reader2.recv() == {"a": 1}


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (ConnectionSpec("nobody", True, True), "family 'nobody'"),
        (ConnectionSpec("multiprocessing", False, False), "neither readable nor writable"),
    ],
)
def test_a_description_that_fits_no_connection(spec: ConnectionSpec, reason: str) -> None:
    reader, writer = os.pipe()
    os.close(writer)
    descriptor = Descriptor(reader)
    with pytest.raises(KindMismatch, match=reason):
        rebuild(Kind("connection", msgspec.Raw(msgspec.msgpack.encode(spec))), [descriptor])
    assert descriptor.closed


def test_another_class_is_no_connection() -> None:
    with (
        Descriptor(os.open("/dev/null", os.O_RDONLY)) as descriptor,
        pytest.raises(UnsupportedKind, match="Descriptor"),
    ):
        describe_connection(descriptor)
