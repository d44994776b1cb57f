"""What pickling asks of a server that holds descriptors, whichever server that is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from fdshare.kernel.descriptor import Descriptor

__all__ = ["ParkingServer"]


class ParkingServer(Protocol):
    """Holds descriptors under keys of KEY_SIZE bytes that nobody can guess.

    Thread-safe, and may be used on both sides of a fork.
    """

    def check(self) -> None:
        """Returns once it answers, and is a server that can be trusted. Raises: FdshareError."""

    def put(self, key: bytes, fds: Sequence[int], ttl: float, uses: int) -> None:
        """It has copies of *fds*, 1 to 250, for *ttl* seconds, to be taken *uses* times.

        *fds* are borrowed for the call. Raises: DescriptorLimit, QuotaExceeded; FdshareError: it
        does not answer; OSError of sendmsg(2).
        """

    def take(self, key: bytes) -> list[Descriptor]:
        """What was put under *key*. The caller owns the result.

        Raises: AlreadyTaken; DescriptorLimit: of this process, and it can be taken again.
        """

    def take_back(self, key: bytes) -> None:
        """Nothing is under *key* any more. Raises: FdshareError: it does not answer."""

    def close(self) -> None:
        """Closes this process's connections."""
