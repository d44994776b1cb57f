"""Receives a descriptor and writes what you type to it.

    $ python pass_fd_client.py demo.socket
    client: descriptor 4 received.
    this was typed at the client

pass_fd_server.py's terminal shows the line, not this one. End it with Ctrl-D.
"""

import argparse
import os
import sys

from fdshare.errors import FdshareError
from fdshare.kernel import cli_conn, recv_fds

MAGIC = b"\xab"


def main() -> None:
    parser = argparse.ArgumentParser(description="Receive a descriptor and write to it.")
    parser.add_argument("path")
    path = parser.parse_args().path
    try:
        with cli_conn(path) as conn, recv_fds(conn, 1, 1, expect=MAGIC) as got:
            if not got.descriptors:
                sys.exit("pass_fd_client.py: the server sent no descriptor")
            descriptor = got.descriptors.pop()  # ours now: the end of `with` closes the others
    except FdshareError as error:
        sys.exit(f"pass_fd_client.py: {error}")
    with descriptor:
        print(f"client: descriptor {descriptor.fileno()} received.", flush=True)
        for line in sys.stdin:
            os.write(descriptor.fileno(), line.encode())


if __name__ == "__main__":
    main()
