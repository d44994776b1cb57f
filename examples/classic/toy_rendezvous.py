"""A rendezvous in thirty lines: names for descriptors, and clients that meet by name.

In one terminal:

    $ python toy_rendezvous.py demo.socket serve
    listening on demo.socket
    put log, pid 5001
    get log, pid 5002

and in another:

    $ python toy_rendezvous.py demo.socket put log notes.txt
    $ python toy_rendezvous.py demo.socket get log
    the first line of notes.txt

The client that opened the file has ended when another one reads it. docs/classic/rendezvous.md says
what this one does not do. Ctrl-C ends it.
"""

import argparse
import shutil
import signal
import socket
import sys

from fdshare.errors import RemoteError
from fdshare.kernel import (
    Credentials,
    Descriptor,
    cli_conn,
    close_all,
    recv_fd,
    send_err,
    send_fd,
    serv_accept,
    serv_listen,
)


def serve(path: str) -> None:
    held: dict[str, Descriptor] = {}
    with serv_listen(path) as listener:
        print(f"listening on {path}", flush=True)
        try:
            while True:
                conn, who = serv_accept(listener)
                with conn:
                    answer(conn, who, held)
        finally:
            close_all(held.values())


def answer(conn: socket.socket, who: Credentials, held: dict[str, Descriptor]) -> None:
    verb, name = conn.recv(300).decode().split()
    print(f"{verb} {name}, pid {who.pid}", flush=True)
    if verb == "put":
        conn.send(b".")  # now the descriptor: it would be lost if it came together with the name
        held[name] = recv_fd(conn)
    elif name in held:
        send_fd(conn, held[name])
    else:
        send_err(conn, 2, f"nothing is held under {name}")


def put(path: str, name: str, file: str) -> None:
    with cli_conn(path) as conn, open(file) as opened:
        conn.send(f"put {name}".encode())
        conn.recv(1)
        send_fd(conn, opened)


def get(path: str, name: str) -> None:
    with cli_conn(path) as conn:
        conn.send(f"get {name}".encode())
        with recv_fd(conn).open() as file:
            shutil.copyfileobj(file, sys.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description="A toy rendezvous.")
    parser.add_argument("path")
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("serve")
    for verb, words in (("put", ("name", "file")), ("get", ("name",))):
        command = verbs.add_parser(verb)
        for word in words:
            command.add_argument(word)
    options = vars(parser.parse_args())
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        {"serve": serve, "put": put, "get": get}[options.pop("verb")](**options)
    except KeyboardInterrupt:
        pass
    except RemoteError as error:
        sys.exit(f"toy_rendezvous.py: {error}")


if __name__ == "__main__":
    main()
