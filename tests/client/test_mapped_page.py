"""MappedPage: what a server's page is mapped from, and what is none."""

from __future__ import annotations

import os
import sys

import pytest
from mp.common import descriptor_limit_reached

from fdshare.client.mapped_page import BLANK, MappedPage
from fdshare.errors import DescriptorLimit, ProtocolError
from fdshare.kernel.descriptor import Descriptor
from fdshare.server.loop.page import MemoryPage, new_page


def test_what_the_server_writes_is_seen_and_cannot_be_written() -> None:
    memfd = new_page()
    assert memfd is not None
    page = MemoryPage(memfd)
    mapped = MappedPage()
    mapped.map(7, Descriptor.dup_of(page.handle.fd))
    page.write(1, 5)
    assert (mapped.now[0], mapped.now[1][1]) == (7, 5)
    with pytest.raises(TypeError):
        mapped.now[1][1] = 6  # type: ignore[index]
    mapped.close()
    assert mapped.now == (0, BLANK)
    memfd.close()
    os.close(page.handle.fd)


def test_where_no_descriptor_is_free_to_import_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "fdshare.kernel.shared_memory")
    page, mapped = Descriptor(os.open(os.devnull, os.O_RDONLY)), MappedPage()
    with descriptor_limit_reached(), pytest.raises(DescriptorLimit):
        mapped.map(7, page)
    assert page.closed


def test_another_descriptor_is_closed_and_refused() -> None:
    wrong = Descriptor(os.open(os.devnull, os.O_RDONLY))
    mapped = MappedPage()
    with pytest.raises(ProtocolError, match="page"):
        mapped.map(7, wrong)
    assert wrong.closed
    assert mapped.now == (0, BLANK)
