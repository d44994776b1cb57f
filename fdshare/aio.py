"""The asynchronous client, for asyncio and trio: `async with fdshare.aio.connect() as client`."""

from fdshare.client.asynchronous.client import AsyncClient, AsyncWatch, connect
from fdshare.client.watch_state import Snapshot
from fdshare.protocol.messages import Entry, Event

__all__ = ["AsyncClient", "AsyncWatch", "Entry", "Event", "Snapshot", "connect"]
