"""An application that answers with its version: WSGI for gunicorn, ASGI for the others."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from typing import Any

import fdshare

BODY = f"version {os.environ.get('VERSION', '0')}\n".encode()


def wsgi(environ: dict[str, Any], start_response: Any) -> list[bytes]:
    start_response("200 OK", [("Content-Length", str(len(BODY)))])
    return [BODY]


async def asgi(scope: dict[str, Any], receive: Any, send: Any) -> None:
    if scope["type"] == "lifespan":
        await lifespan(receive, send)
        return
    headers = [(b"content-length", str(len(BODY)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": BODY})


async def lifespan(receive: Any, send: Any) -> None:
    """gunicorn sends READY=1 by itself; for uvicorn and hypercorn the application does."""
    await receive()
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, accept_no_more)
    await send({"type": "lifespan.startup.complete"})
    # After the current callbacks: then the server accepts.
    asyncio.get_running_loop().call_later(0.1, fdshare.notify, "READY=1")
    await receive()
    await send({"type": "lifespan.shutdown.complete"})


def accept_no_more() -> None:
    """Leaves new connections to the other holders of the socket; answers those accepted before.

    When they stop, uvicorn and hypercorn close connections that they have accepted and not read
    yet. So send SIGUSR1, wait a moment, and then send SIGTERM.
    """
    for number in os.listdir("/proc/self/fd"):
        try:
            with socket.socket(fileno=os.dup(int(number))) as sock:
                listening = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        except OSError:
            continue
        if listening:
            asyncio.get_running_loop().remove_reader(int(number))
