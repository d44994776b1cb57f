"""Without connections: one socket for all clients, and every message arrives as it was sent.

In one terminal:

    $ python datagram_server.py demo.socket
    bound to demo.socket
    12 bytes from client.5001: good morning
    10 bytes from client.5002: and to you

and in others what datagram_client.py shows. A client that binds no name of its own can send, but
gets no answer:

    no answer: the sender has no name

Ctrl-C ends the server.
"""

import argparse
import os
import signal
import socket

from fdshare.kernel import listen, recv_fds, send_fds

LONGEST = 65536


def main() -> None:
    parser = argparse.ArgumentParser(description="Answer datagrams in capitals.")
    parser.add_argument("path")
    path = parser.parse_args().path
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with listen(path, kind=socket.SOCK_DGRAM) as server:
        print(f"bound to {path}", flush=True)
        try:
            while True:
                answer_one(server.socket)
        except KeyboardInterrupt:
            pass


def answer_one(sock: socket.socket) -> None:
    with recv_fds(sock, LONGEST, 0) as message:
        if message.address is None:
            print("no answer: the sender has no name", flush=True)
            return
        name = os.path.basename(os.fsdecode(message.address))
        text = message.data.decode(errors="replace")
        print(f"{len(message.data)} bytes from {name}: {text}", flush=True)
        try:
            send_fds(sock, [], message.data.upper() or b"?", address=message.address)
        except OSError as error:  # the client did not wait for the answer
            print(f"no answer to {name}: {error.strerror}", flush=True)


if __name__ == "__main__":
    main()
