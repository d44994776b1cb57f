"""waitress on a socket that its service manager passes; SIGUSR1 drains it, SIGTERM ends it.

fdshare deploy --health / --drain-signal USR1 web=tcp://127.0.0.1:8080 -- python waitress_server.py
"""

from __future__ import annotations

import signal
import sys

import waitress
from app import wsgi

import fdshare


def main() -> None:
    [passed] = fdshare.listen_fds()["web"]
    server = waitress.create_server(wsgi, sockets=[passed.socket()])

    def drain(*_: object) -> None:
        server.accepting = False  # the others who have the socket accept; this one answers

    signal.signal(signal.SIGUSR1, drain)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    server.run()


if __name__ == "__main__":
    main()
