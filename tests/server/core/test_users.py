"""What one uid may have of something that all share."""

from __future__ import annotations

import pytest

from fdshare.server.core.users import allowance


@pytest.mark.parametrize(
    ("share", "limit", "others", "allowed"),
    [
        (50, 100, 0, 50),  # alone
        (50, 100, 50, 25),  # half of what is left
        (50, 100, 99, 1),
        (10, 100, 60, 10),  # there is more than enough
        (10, 100, 90, 5),
        (100, 100, 0, 100),  # as it was set
        (100, 100, 40, 60),
        (200, 100, 0, 200),  # the limit of all decides
        (1, 2, 1, 1),
    ],
)
def test_allowance(share: int, limit: int, others: int, allowed: int) -> None:
    assert allowance(share, limit, others) == allowed


def test_there_is_always_something_left() -> None:
    used = 0
    for _ in range(8):
        used += allowance(500, 1000, used)
    assert used < 1000
