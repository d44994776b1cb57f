"""inspections: long answers, and descriptors that nobody can look at at once."""

from __future__ import annotations

from fdshare.client.blocking.client import Client


def test_infos_with_much_metadata(client: Client, null: int) -> None:
    """No part of an answer is longer than a frame may be."""
    for number in range(400):
        client.register(f"{number}", null, metadata={"key": "x" * 4000})
    assert len(client.infos()) == 400
