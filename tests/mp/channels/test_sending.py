"""Messages that do not fit at once, are cancelled, or are packed in boxes."""

from __future__ import annotations

import os
import socket

import pytest

from fdshare.kernel.ancillary import close_all
from fdshare.mp.channels.sending import Outgoing, send_now
from fdshare.mp.pickling.bundle import Bundle
from mp.common import Pair, Read, expecting_or_not, identity, received


@expecting_or_not
def test_what_does_not_fit_is_sent_later(pair: Pair, null: int, read: Read) -> None:
    left, right = pair
    sent = 0
    while (rest := send_now(left, Bundle(b"x" * 900, [null]), socket.MSG_DONTWAIT)) is None:
        sent += 1
    assert not rest.push(left, socket.MSG_DONTWAIT)
    rest.own()
    for _ in range(sent):
        assert received(read(right, False)) == (b"x" * 900, 1)
    assert rest.push(left, socket.MSG_DONTWAIT)
    assert received(read(right, False)) == (b"x" * 900, 1)


@expecting_or_not
@pytest.mark.parametrize("count", [1, 300])
def test_cancelled(pair: Pair, null: int, count: int, read: Read) -> None:
    left, right = pair
    message = Outgoing(Bundle(b"never", [null] * count))
    left.send(bytes(message.parts.pop(0)[0][0]))  # announced
    message.cancel(left)
    send_now(left, b"plain", 0)
    send_now(left, Bundle(b"next", [null]), 0)
    assert read(right, False) == b"plain"
    assert received(read(right, False)) == (b"next", 1)


@expecting_or_not
def test_a_box_holds_its_contents_until_sent(pair: Pair, read: Read) -> None:
    left, right = pair
    reader, writer = os.pipe()
    message = Outgoing(Bundle(b"data", [writer] * 600))
    os.close(writer)
    message.own()  # nothing to duplicate: the kernel has them
    message.push(left)
    bundle = read(right, False)
    assert isinstance(bundle, Bundle)
    assert len({identity(copy) for copy in bundle.owned or ()}) == 1
    close_all(bundle.owned or ())
    assert os.read(reader, 1) == b""
    os.close(reader)
