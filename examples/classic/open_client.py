"""Asks the open server for a file and reads it, or appends to it what you type.

    $ python open_client.py demo.socket r /srv/reports/may.txt
    Nothing happened in May.
    $ python open_client.py demo.socket r /etc/shadow
    open_client.py: no rule allows uid 1000 to open it for r (EACCES)

This program opens no file itself: open_server.py opened the descriptor that it reads, with the
server's rights. With --traceback the server sends the traceback of an error.
"""

import argparse
import errno
import shutil
import sys

from fdshare.errors import FdshareError, RemoteError
from fdshare.kernel import cli_conn, recv_fd


def main() -> int:
    parser = argparse.ArgumentParser(description="Have a file opened by the open server.")
    parser.add_argument("--traceback", action="store_true")
    parser.add_argument("server")
    parser.add_argument("mode", choices=["r", "w", "a"])
    parser.add_argument("path")
    options = parser.parse_args()
    verb = "trace-open" if options.traceback else "open"
    request = f"{verb} {options.mode} {options.path}".encode() + b"\0"
    try:
        with cli_conn(options.server) as conn:
            conn.sendall(request)
            descriptor = recv_fd(conn)
    except RemoteError as error:
        name = errno.errorcode.get(error.status, f"status {error.status}")
        print(f"open_client.py: {error} ({name})", file=sys.stderr)
        return 1
    except FdshareError as error:
        print(f"open_client.py: {error}", file=sys.stderr)
        return 1
    if options.mode == "r":
        with descriptor.open("rb") as file:
            shutil.copyfileobj(file, sys.stdout.buffer)
    else:
        with descriptor.open("wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
