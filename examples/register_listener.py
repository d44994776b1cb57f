"""Bind a TCP listener, register it with the rendezvous server, and leave: the port stays open.

In one terminal a server, and this program:

    $ fdshare serve /tmp/demo.sock &
    $ python register_listener.py /tmp/demo.sock
    127.0.0.1:8080 is registered as 'web'; this process (pid 4021) is not needed any more

In one or more other terminals, serve the connections:

    $ python serve_by_name.py /tmp/demo.sock

and connect: curl http://127.0.0.1:8080/. Connections that come while no program serves wait in the
listener's queue. With port 0 the kernel chooses a port.
"""

from __future__ import annotations

import argparse
import os
import socket

import fdshare


def main() -> None:
    parser = argparse.ArgumentParser(description="Bind a TCP listener and register it.")
    parser.add_argument("path", nargs="?", help="socket of the rendezvous server")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--name", default="web")
    options = parser.parse_args()

    with (
        fdshare.connect(options.path) as rendezvous,
        socket.create_server(("127.0.0.1", options.port)) as listener,
    ):
        rendezvous.register(options.name, listener, replace=True)
        host, port = listener.getsockname()
        print(
            f"{host}:{port} is registered as {options.name!r}; "
            f"this process (pid {os.getpid()}) is not needed any more",
            flush=True,
        )


if __name__ == "__main__":
    main()
