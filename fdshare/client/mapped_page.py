"""MappedPage: the memory that the server writes and followers read, as a client has it mapped."""

from __future__ import annotations

import array
from collections.abc import Sequence
from typing import Final

from fdshare.errors import DescriptorLimit, FdshareError, ProtocolError
from fdshare.kernel.descriptor import Descriptor
from fdshare.kernel.descriptor_limit import first_use

__all__ = ["BLANK", "MappedPage"]

# Where nothing is written: for a server without a page, and for slot 0.
BLANK: Final = array.array("Q", [0])


class MappedPage:
    """The page of a client's server, as it is mapped here: read-only."""

    def __init__(self) -> None:
        self.close()

    def close(self) -> None:
        """Forgets it; it is unmapped when nobody looks any more."""
        # Its id, and its words: changed together, for other threads and signals' handlers look.
        self.now: tuple[int, Sequence[int]] = 0, BLANK

    def map(self, id: int, descriptor: Descriptor) -> None:
        """Maps another page, and closes its *descriptor*. Raises: ProtocolError: it is none;
        DescriptorLimit."""
        try:
            with descriptor, first_use():
                from fdshare.kernel.shared_memory import SharedMemory  # for who follows; see kinds/

                with SharedMemory.adopt(descriptor) as memory:
                    words = memory.buf.toreadonly().cast("Q")
        except DescriptorLimit:
            raise
        except (FdshareError, OSError, TypeError) as error:
            raise ProtocolError(f"the server's page is none: {error}") from None
        self.now = id, words
