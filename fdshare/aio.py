"""The asynchronous client, for asyncio and trio: `async with fdshare.aio.connect() as client`."""

from fdshare.client.asynchronous.client import AsyncClient, connect
from fdshare.client.asynchronous.watch import AsyncWatcher
from fdshare.client.watch_state import Snapshot
from fdshare.protocol.messages import Event, Registered

__all__ = ["AsyncClient", "AsyncWatcher", "Event", "Registered", "Snapshot", "connect"]
