"""What the tests of the pure core share."""

from __future__ import annotations

import pytest

from server.memory_effects import MemoryEffects


@pytest.fixture
def effects() -> MemoryEffects:
    """A service and a table of its own, without a kernel."""
    return MemoryEffects()
