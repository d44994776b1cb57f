"""Wrong uses of a client."""

from __future__ import annotations

import fdshare
from fdshare import aio

client = fdshare.connect()
client.register(b"web", 0)  # refused
client.bind("web")  # refused
number: int = client.bind("web", "tcp://127.0.0.1:0")  # refused
client.fetch("web", wait=3)  # refused
client.names().web()  # refused


async def asynchronous() -> None:
    async with aio.connect("path") as client:
        client.names().sort()  # refused
