"""An entry is fetched if it is the one that was looked at."""

from __future__ import annotations

from fdshare import Client
from fdshare.cli.support.fetch_exact import fetch_exact
from fdshare.kernel.ancillary import close_all


def test_it_is_that_entry_and_no_other(client: Client, null: int) -> None:
    client.register("x", null)
    entry = client.info("x")
    fetched = fetch_exact(client, entry)
    assert fetched is not None
    given, descriptors = fetched
    assert (given.generation, len(descriptors)) == (entry.generation, 1)
    close_all(descriptors)
    client.register("x", null, replace=True)
    assert fetch_exact(client, entry) is None
    client.unregister("x")
    assert fetch_exact(client, entry) is None
