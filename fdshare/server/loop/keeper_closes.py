"""What the keeper has still to close of what changes have removed, for each user.

Both halves close their copies, and a file system may hang in the keeper alone. What is open there
counts against its user as if it were open here: else this user could register and remove until the
keeper has no number left.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Final

__all__ = ["KeeperCloses"]

# Seconds after which a close that the keeper has not reported is taken for one that hangs.
_STUCK: Final = 0.1


class KeeperCloses:
    """Counts of descriptors. *open*: uid -> how many."""

    def __init__(self) -> None:
        self.open: dict[int, int] = {}
        self._since: dict[int, float] = {}  # when the first of them was removed, or the last closed

    def add(self, uids: Iterable[int]) -> None:
        """A change has removed a descriptor of each of *uids*. What the server made itself, of a
        negative uid, is nobody's."""
        for uid in uids:
            if uid >= 0:
                self.open[uid] = self.open.get(uid, 0) + 1
                self._since.setdefault(uid, time.monotonic())

    def closed(self, counts: Mapping[int, int]) -> None:
        """The keeper has closed so many of each uid."""
        for uid, count in counts.items():
            left = self.of(uid) - count
            if left > 0:
                self.open[uid], self._since[uid] = left, time.monotonic()
            else:
                self.open.pop(uid, None)
                self._since.pop(uid, None)

    def clear(self) -> None:
        """The keeper is dead. What it held counts no more: the next one has copies of the table."""
        self.open.clear()
        self._since.clear()

    def of(self, uid: int) -> int:
        """How many descriptors of *uid*."""
        return self.open.get(uid, 0)

    def hangs(self, uid: int) -> bool:
        """Whether the keeper has closed none of *uid* for some time, and has some to close."""
        return uid in self._since and time.monotonic() - self._since[uid] > _STUCK

    def hanging(self) -> dict[int, int]:
        """uid -> how many descriptors wait for a close that hangs."""
        return {uid: count for uid, count in self.open.items() if self.hangs(uid)}
