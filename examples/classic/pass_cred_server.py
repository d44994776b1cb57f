"""Sends its standard output, with its credentials, which the kernel verifies.

In one terminal:

    $ python pass_cred_server.py demo.socket
    listening on demo.socket
    descriptor sent, pid 5000, uid 1000, gid 1000
    this was typed at the client

and in another what pass_cred_client.py shows. The client's own output may go nowhere:

    $ python pass_cred_client.py demo.socket >/dev/null 2>&1
    this was typed at the client

and the line still appears at the server, because it goes through the server's open file. Ctrl-C
ends the server.
"""

import argparse
import signal
import socket
import sys

from fdshare.kernel import own_credentials, send_fds, serv_accept, serv_listen

MAGIC = b"\xab"


def main() -> None:
    parser = argparse.ArgumentParser(description="Send standard output and the own credentials.")
    parser.add_argument("path")
    path = parser.parse_args().path
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with serv_listen(path) as listener:
        print(f"listening on {path}", flush=True)
        try:
            while True:
                conn, _ = serv_accept(listener)
                with conn:
                    give(conn)
        except KeyboardInterrupt:
            pass


def give(conn: socket.socket) -> None:
    try:
        send_fds(conn, [sys.stdout], MAGIC, credentials=True)
    except ConnectionError:
        return  # the client closed before it was served
    me = own_credentials()
    # One write, because print() may do two, and others write to the same file now.
    sys.stdout.write(f"descriptor sent, pid {me.pid}, uid {me.uid}, gid {me.gid}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
