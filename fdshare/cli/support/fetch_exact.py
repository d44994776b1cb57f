"""The descriptors of an entry whose registrant was looked at, and of no other of its name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fdshare.client.conversation import Exchange
from fdshare.errors import NameNotFound
from fdshare.kernel.ancillary import close_all
from fdshare.protocol import messages as m

if TYPE_CHECKING:
    from fdshare.client.blocking.client import Client
    from fdshare.client.verbs import Steps
    from fdshare.kernel.descriptor import Descriptor

__all__ = ["fetch_exact"]


def fetch_exact(client: Client, entry: m.EntryInfo) -> tuple[m.Given, list[Descriptor]] | None:
    """The answer to a fetch of *entry*, and its descriptors, as they are; None if it is gone, or
    another has its name now. The caller owns the result. Raises: FdshareError.

    What an entry says is true of its descriptors only if both are of one generation.
    """
    try:
        given, descriptors = client._do(_fetch(entry.name))
    except NameNotFound:
        return None
    if given.generation != entry.generation:
        close_all(descriptors)
        return None
    return given, descriptors


def _fetch(name: str) -> Steps[tuple[m.Given, list[Descriptor]]]:
    parts = yield Exchange(m.Fetch(name))
    given: m.Given = parts.replies[0]
    return given, parts.descriptors
