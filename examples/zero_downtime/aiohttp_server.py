"""aiohttp on a socket that its service manager passes; SIGUSR1 drains it, SIGTERM ends it.

fdshare deploy --health / --drain-signal USR1 web=tcp://127.0.0.1:8080 -- python aiohttp_server.py
"""

from __future__ import annotations

import asyncio
import signal

from aiohttp import web
from app import BODY, accept_no_more

import fdshare


async def answer(request: web.Request) -> web.Response:
    return web.Response(body=BODY)


async def drain_on_signal(app: web.Application) -> None:
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, accept_no_more)


def main() -> None:
    [passed] = fdshare.listen_fds()["web"]
    application = web.Application()
    application.router.add_get("/", answer)
    application.on_startup.append(drain_on_signal)
    web.run_app(application, sock=passed.socket(), print=None, access_log=None)


if __name__ == "__main__":
    main()
