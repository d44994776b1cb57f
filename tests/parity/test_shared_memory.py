"""A program with multiprocessing.shared_memory, and the one that docs/compat.md makes of it."""

from __future__ import annotations

from multiprocessing import shared_memory

import numpy as np
import pytest
from mp.common import trackers  # noqa: F401
from nursery import Manager

from fdshare import NameNotFound, SharedMemory


def test_line_by_line() -> None:
    with Manager() as manager:
        standard = shared_memory.SharedMemory(create=True, size=16)
        ours = SharedMemory(16)
        name = standard.name
        manager.register(name, ours)
        beside, fetched = shared_memory.SharedMemory(name), manager.fetch(name)
        for memory in (standard, ours):
            assert memory.size == 16
            memory.buf[0] = 1
        np.ndarray((2,), "i4", standard.buf)[1] = 5
        ours.as_array("i4", (2,))[1] = 5
        assert bytes(beside.buf) == bytes(fetched.buf)
        view = standard.buf[:1], ours.buf[:1]
        with pytest.raises(BufferError):
            standard.close()
        ours.close()
        assert view[1][0] == 1
        view[0].release()
        for memory in (standard, beside, fetched):
            memory.close()
        standard.unlink()
        with pytest.raises(FileNotFoundError):
            shared_memory.SharedMemory(name)
        manager.unregister(name)
        with pytest.raises(NameNotFound):
            manager.fetch(name)
