"""Sends each line as one datagram from a name of its own, which receives the answer.

    $ python datagram_client.py demo.socket
    bound to client.5001
    good morning
    GOOD MORNING

The name is in the server's folder, and the client removes it when it ends (Ctrl-D).
datagram_server.py shows the other side.
"""

import argparse
import os
import sys

from fdshare.kernel import datagram, recv_fds, send_fds


def main() -> None:
    parser = argparse.ArgumentParser(description="Send each line as a datagram.")
    parser.add_argument("path")
    path = parser.parse_args().path
    server = os.path.abspath(path)
    name = os.path.join(os.path.dirname(server), f"client.{os.getpid()}")
    with datagram(name) as client:
        print(f"bound to {os.path.basename(name)}", flush=True)
        for line in sys.stdin:
            try:
                send_fds(client.socket, [], line.rstrip("\n").encode() or b" ", address=server)
            except (FileNotFoundError, ConnectionRefusedError):
                sys.exit(f"datagram_client.py: nobody reads {path}")
            with recv_fds(client.socket, 65536, 0) as answer:
                print(answer.data.decode(), flush=True)


if __name__ == "__main__":
    main()
