"""Receives a descriptor and the sender's credentials, and writes what you type to it.

    $ python pass_cred_client.py demo.socket
    client: received from pid 5000, uid 1000, gid 1000
    client: descriptor 4 received.
    this was typed at the client

The line appears at pass_cred_server.py. A sender with false credentials gets an error from the
kernel (unless it is root), and nothing arrives. End it with Ctrl-D.
"""

import argparse
import os
import sys

from fdshare.errors import FdshareError
from fdshare.kernel import cli_conn, enable_credentials, recv_fds

MAGIC = b"\xab"


def main() -> None:
    parser = argparse.ArgumentParser(description="Receive a descriptor and who sent it.")
    parser.add_argument("path")
    path = parser.parse_args().path
    try:
        with cli_conn(path) as conn:
            enable_credentials(conn)
            with recv_fds(conn, 1, 1, expect=MAGIC) as got:
                if not got.descriptors or got.credentials is None:
                    sys.exit("pass_cred_client.py: the server sent too little")
                # The descriptor is ours now: the end of `with` closes the others.
                descriptor, who = got.descriptors.pop(), got.credentials
    except FdshareError as error:
        sys.exit(f"pass_cred_client.py: {error}")
    with descriptor:
        print(f"client: received from pid {who.pid}, uid {who.uid}, gid {who.gid}", flush=True)
        print(f"client: descriptor {descriptor.fileno()} received.", flush=True)
        for line in sys.stdin:
            os.write(descriptor.fileno(), line.encode())


if __name__ == "__main__":
    main()
