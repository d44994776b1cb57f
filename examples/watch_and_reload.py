"""Servers that reload when another configuration is published: an open file under a name.

    $ fdshare serve /tmp/demo.sock &
    $ python watch_and_reload.py /tmp/demo.sock publish '{"greeting": "hello"}'
    published generation 1

    $ python watch_and_reload.py /tmp/demo.sock serve --address tcp://127.0.0.1:8080
    pid 4022 serves 127.0.0.1:8080
    generation 1: {"greeting": "hello"}

    $ python watch_and_reload.py /tmp/demo.sock publish '{"greeting": "good morning"}'
    published generation 3

    $ nc 127.0.0.1 8080
    good morning

Every copy of the server gets the change at once, without polling and without a signal. The file has
no path: no program can read it half written, and each generation stays as it is for programs that
still read it. After a restart of the rendezvous server a new snapshot comes, so no change is
missed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import tempfile
from typing import Any

import fdshare.aio

NAME = "config"


async def publish(path: str | None, text: str) -> None:
    json.loads(text)  # refuse what is no JSON
    with tempfile.TemporaryFile() as file:
        file.write(text.encode())
        async with fdshare.aio.connect(path) as rendezvous:
            entry = await rendezvous.register(NAME, file, replace=True)
    print(f"published generation {entry.generation}")


class Server:
    def __init__(self) -> None:
        self.config: dict[str, Any] = {}

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(f"{self.config.get('greeting', 'not configured')}\n".encode())
        writer.close()

    async def keep_up(self, rendezvous: fdshare.aio.AsyncClient) -> None:
        """Follows the name; `held` is the current state, whichever item came."""
        loaded = 0
        async with rendezvous.watch(NAME) as watch:
            async for _ in watch:
                generation = watch.held.get(NAME, loaded)
                if generation != loaded:
                    await self.load(rendezvous, generation)
                    loaded = generation

    async def load(self, rendezvous: fdshare.aio.AsyncClient, generation: int) -> None:
        try:
            file = await rendezvous.fetch(NAME)
        except fdshare.errors.NameNotFound:
            return  # it was removed; the last one stays loaded
        with file:
            # pread: the offset of the file is shared with all who have it open.
            data = os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0)
        self.config = json.loads(data)
        print(f"generation {generation}: {json.dumps(self.config)}", flush=True)


async def serve(path: str | None, address: str) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with fdshare.aio.connect(path) as rendezvous:
        listener = await rendezvous.bind("greeter", address)
        host, port = listener.getsockname()
        server = Server()
        following = asyncio.create_task(server.keep_up(rendezvous))
        following.add_done_callback(lambda _: stop.set())  # it ends only with an error
        async with await asyncio.start_server(server.answer, sock=listener):
            print(f"pid {os.getpid()} serves {host}:{port}", flush=True)
            await stop.wait()
        following.cancel()
        await asyncio.wait([following])
        if not following.cancelled():
            following.result()


def main() -> None:
    parser = argparse.ArgumentParser(description="Publish a configuration, or serve with it.")
    parser.add_argument("path", help="socket of the rendezvous server")
    commands = parser.add_subparsers(dest="command", required=True)
    publishing = commands.add_parser("publish")
    publishing.add_argument("text", help="the configuration, as JSON")
    serving = commands.add_parser("serve")
    serving.add_argument("--address", default="tcp://127.0.0.1:8080")
    options = parser.parse_args()
    if options.command == "publish":
        asyncio.run(publish(options.path, options.text))
    else:
        asyncio.run(serve(options.path, options.address))


if __name__ == "__main__":
    main()
