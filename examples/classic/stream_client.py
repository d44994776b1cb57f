"""Sends what you type over a connection of its own, and prints the answers.

    $ python stream_client.py demo.socket
    good morning
    GOOD MORNING

End it with Ctrl-D. stream_server.py shows the other side.
"""

import argparse
import sys

from fdshare.errors import EndpointError
from fdshare.kernel import cli_conn


def main() -> None:
    parser = argparse.ArgumentParser(description="Send each line over a connection.")
    parser.add_argument("path")
    path = parser.parse_args().path
    try:
        conn = cli_conn(path)
    except EndpointError as error:
        sys.exit(f"stream_client.py: {error}")
    with conn, conn.makefile("rw") as lines:
        for line in sys.stdin:
            lines.write(line)
            lines.flush()
            print(lines.readline(), end="", flush=True)


if __name__ == "__main__":
    main()
