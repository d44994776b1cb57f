"""Every client has a connection of its own, and the kernel says who the client is.

In one terminal:

    $ python stream_server.py demo.socket
    listening on demo.socket
    connected: pid 5001, uid 1000, gid 1000
    connected: pid 5002, uid 1000, gid 1000
    pid 5001: good morning
    pid 5002: and to you
    disconnected: pid 5001
    disconnected: pid 5002

and in two others, at the same time, what stream_client.py shows. Ctrl-C ends the server, and
removes the name.
"""

import argparse
import os
import signal
import socket
import threading

from fdshare.kernel import Credentials, serv_accept, serv_listen


def say(text: str) -> None:
    # One write(2): threads that print() mix their lines, and one that has the lock of sys.stdout
    # when the program ends is a fatal error of Python.
    os.write(1, f"{text}\n".encode(errors="backslashreplace"))


def serve(conn: socket.socket, who: Credentials) -> None:
    say(f"connected: pid {who.pid}, uid {who.uid}, gid {who.gid}")
    with conn, conn.makefile("rw", errors="replace") as lines:
        try:
            for line in lines:
                say(f"pid {who.pid}: {line.rstrip()}")
                lines.write(line.upper())
                lines.flush()
        except ConnectionError:
            pass  # the client closed before it read the answer
    say(f"disconnected: pid {who.pid}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Answer each line in capitals.")
    parser.add_argument("path")
    path = parser.parse_args().path
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with serv_listen(path) as listener:
        print(f"listening on {path}", flush=True)
        try:
            while True:
                conn, who = serv_accept(listener)
                threading.Thread(target=serve, args=(conn, who), daemon=True).start()
        except KeyboardInterrupt:
            pass


if __name__ == "__main__":
    main()
