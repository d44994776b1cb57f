"""The asynchronous client, for asyncio and trio: `async with fdshare.aio.connect() as client`.

What its verbs return has the names that `fdshare` gives it: Registered, Snapshot, Event ...
"""

from fdshare.client.asynchronous.client import AsyncClient, connect
from fdshare.client.asynchronous.follow import AsyncFollower
from fdshare.client.asynchronous.watch import AsyncWatcher

__all__ = ["AsyncClient", "AsyncFollower", "AsyncWatcher", "connect"]
