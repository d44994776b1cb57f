"""A trio server on a listener that outlives it: upper-case echo, in as many copies as you like.

    $ fdshare serve /tmp/demo.sock &
    $ python trio_server.py /tmp/demo.sock --address tcp://127.0.0.1:8080
    pid 4022 serves 127.0.0.1:8080

    $ nc 127.0.0.1 8080
    hello
    HELLO

It does what aio_server.py does, and both may serve one port at the same time.
"""

from __future__ import annotations

import argparse
import os
import signal

import trio

import fdshare.aio


async def answer(stream: trio.SocketStream) -> None:
    try:
        async for data in stream:
            await stream.send_all(data.upper())
    except trio.BrokenResourceError:
        pass


async def serve(listener: trio.SocketListener, stop: trio.CancelScope) -> None:
    """Accepts until it is stopped, then answers what it has accepted."""
    async with trio.open_nursery() as connections:
        with stop:
            await trio.serve_listeners(answer, [listener], handler_nursery=connections)
        await listener.aclose()  # this process's copy; the server keeps the port open


async def main() -> None:
    parser = argparse.ArgumentParser(description="Serve on a listener that has a name.")
    parser.add_argument("path", nargs="?", help="socket of the rendezvous server")
    parser.add_argument("--name", default="web")
    parser.add_argument("--address", default="tcp://127.0.0.1:8080")
    options = parser.parse_args()

    async with fdshare.aio.connect(options.path) as rendezvous:
        listener = await rendezvous.bind(options.name, options.address)

    host, port = listener.getsockname()
    stop = trio.CancelScope()
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            sock = trio.socket.from_stdlib_socket(listener)
            nursery.start_soon(serve, trio.SocketListener(sock), stop)
            print(f"pid {os.getpid()} serves {host}:{port}", flush=True)
            async for _ in signals:
                stop.cancel()
                break


if __name__ == "__main__":
    trio.run(main)
