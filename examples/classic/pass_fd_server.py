"""Sends its own standard output to each client.

In one terminal:

    $ python pass_fd_server.py demo.socket
    listening on demo.socket
    descriptor sent
    this was typed at the client

and in another what pass_fd_client.py shows. Lines that are typed there appear here, although this
program does not handle them: the client writes to the same open file. Ctrl-C ends the server.
"""

import argparse
import signal
import sys

from fdshare.kernel import send_fds, serv_accept, serv_listen

MAGIC = b"\xab"


def main() -> None:
    parser = argparse.ArgumentParser(description="Send standard output to each client.")
    parser.add_argument("path")
    path = parser.parse_args().path
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with serv_listen(path) as listener:
        print(f"listening on {path}", flush=True)
        try:
            while True:
                conn, _ = serv_accept(listener)
                with conn:
                    try:
                        send_fds(conn, [sys.stdout], MAGIC)
                    except ConnectionError:
                        continue  # the client closed before it was served
                # One write, because print() may do two, and others write to the same file now.
                sys.stdout.write("descriptor sent\n")
                sys.stdout.flush()
        except KeyboardInterrupt:
            pass


if __name__ == "__main__":
    main()
