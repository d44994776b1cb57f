"""What the verbs give: `bind` a socket, `fetch` what was registered, which its caller knows."""

from __future__ import annotations

import socket
from typing import assert_type

import fdshare
from fdshare import aio


def main(listener: socket.socket) -> None:
    with fdshare.Manager() as manager, fdshare.connect(manager.address) as client:
        assert_type(client, fdshare.Client)
        assert_type(client.register("web", listener), fdshare.Registered)
        web: socket.socket = client.fetch("web")
        web.close()
        assert_type(client.bind("api", "tcp://127.0.0.1:0"), socket.socket)
        assert_type(client.names("*"), list[str])
        assert_type(client.fetch_raw("web"), list[fdshare.Descriptor])
        try:
            client.take("gone", timeout=0.1)
        except fdshare.FetchTimeout as error:
            assert_type(error.name, str)


async def asynchronous(path: str) -> None:
    async with aio.connect(path) as client:
        assert_type(await client.bind("api", "tcp://127.0.0.1:0"), socket.socket)
        assert_type(await client.names(), list[str])
