"""An asyncio server on a listener that outlives it: upper-case echo, in as many copies as you like.

    $ fdshare serve /tmp/demo.sock &
    $ python aio_server.py /tmp/demo.sock --address tcp://127.0.0.1:8080
    pid 4022 serves 127.0.0.1:8080

    $ nc 127.0.0.1 8080
    hello
    HELLO

For the first copy the rendezvous server binds the address; all others get the same socket by its
name. Stop a copy (Ctrl-C) while another one runs, or while none does: the port stays open, and
connections wait in its queue. Each copy answers what it has accepted before it ends.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal

import fdshare.aio


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while line := await reader.readline():
            writer.write(line.upper())
            await writer.drain()
    except ConnectionError:
        pass
    finally:
        writer.close()


async def main() -> None:
    parser = argparse.ArgumentParser(description="Serve on a listener that has a name.")
    parser.add_argument("path", nargs="?", help="socket of the rendezvous server")
    parser.add_argument("--name", default="web")
    parser.add_argument("--address", default="tcp://127.0.0.1:8080")
    options = parser.parse_args()

    async with fdshare.aio.connect(options.path) as rendezvous:
        listener = await rendezvous.bind(options.name, options.address)

    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)

    open_connections: set[asyncio.Task[None]] = set()

    def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(answer(reader, writer))
        open_connections.add(task)
        task.add_done_callback(open_connections.discard)

    # It is non-blocking from now on, in every process that shares it, as event loops need it.
    server = await asyncio.start_server(accepted, sock=listener)
    host, port = listener.getsockname()
    print(f"pid {os.getpid()} serves {host}:{port}", flush=True)
    await stop.wait()
    server.close()  # this process's copy; the server keeps the port open
    await asyncio.gather(*open_connections)


if __name__ == "__main__":
    asyncio.run(main())
