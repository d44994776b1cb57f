"""A take that is confirmed late: when its program runs, or its content was written.

The lease gives the entry back when this process ends before. An exec leaves nobody who could
confirm, so a process of its own does it, a child of init, which one end of a socket pair tells:

    fdshare take ── exec ──> the program, same pid
        ├─ the witness, close-on-exec: "E", then the end ─┐
        └─ fork, fork ──> reads it, confirms the lease <──┘
"""

from __future__ import annotations

import os
import socket
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from fdshare.cli.support.exec import EXECUTING, FAILED
from fdshare.cli.support.orphan import fork_orphan
from fdshare.client import verbs
from fdshare.client.conversation import LeaseEnd
from fdshare.errors import FdshareError
from fdshare.kernel.descriptor import Descriptor
from fdshare.kernel.descriptor_table import close_all_but
from fdshare.printable import printable

if TYPE_CHECKING:
    from fdshare.client.blocking.client import Client

__all__ = ["Claim"]


@dataclass(slots=True)
class Claim:
    """The lease of what is given under *name*, until it is confirmed or closed."""

    name: str
    lease: Descriptor

    @classmethod
    def of(cls, client: Client, name: str, timeout: float | None) -> tuple[list[Descriptor], Self]:
        """The descriptors of *name*, for which it waits up to *timeout* seconds (None: for
        ever), and the claim.

        The caller owns both. Raises: as Client.take_raw.
        """
        descriptors, lease = client._do(verbs.lease_raw(name, timeout))
        return descriptors, cls(name, lease)

    def confirm(self) -> None:
        """Returns when the entry is removed; does nothing if that was done before.

        Raises: FdshareError: it was replaced, removed or given back meanwhile.
        """
        if self.lease.closed:
            return
        with self.lease:
            confirmed = verbs.confirm(self.lease, None, lambda _: None)
        if confirmed is None:
            raise FdshareError(
                f"{self.name!r} was used, but it is not taken: it was replaced or removed "
                "meanwhile, or this took longer than the lease_timeout of the server"
            )
        with confirmed:
            LeaseEnd(confirmed).wait()

    def confirm_at_exec(self) -> Descriptor:
        """The witness for `Launch`: another process confirms when the exec has closed it.

        Close the claim afterwards. The caller owns the result. Raises: OSError: nobody is there
        to confirm.
        """
        ours, theirs = (Descriptor(end.detach()) for end in socket.socketpair())
        if not fork_orphan():
            theirs.close()
            return ours
        try:
            self._watch(theirs)
        finally:
            os._exit(0)

    def _watch(self, witness: Descriptor) -> None:
        """In the other process: confirms once the exec has succeeded, and only then."""
        close_all_but({witness.fileno(), self.lease.fileno()})
        said = b""
        while FAILED not in said and (data := os.read(witness.fileno(), 16)):
            said += data
        if said != EXECUTING:  # it failed, or the process was killed before
            return
        try:
            self.confirm()
        except FdshareError as error:
            print(f"fdshare: {printable(str(error))}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Gives the entry back, unless it was confirmed."""
        self.lease.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
