"""Bind a name in the file system to a socket, and find it there again.

    $ python bind_name.py
    UNIX domain socket bound to foo.socket
    $ ls -l foo.socket
    srw------- 1 you you 0 Nov 22 10:30 foo.socket
    $ python bind_name.py
    bind failed: Address already in use
    A stale socket: the process that bound it is gone.
    Remove the file (rm foo.socket), or take the name over: python bind_name.py --reclaim foo.socket
    $ python bind_name.py --reclaim
    UNIX domain socket bound to foo.socket

The name outlives the process: UNIX does not remove it. While a process has the socket open, or if
the file is no socket, --reclaim is refused, too, and the error says why. Another name may be given
as the last argument.
"""

import argparse
import errno
import os
import shlex
import sys

from fdshare.errors import AddressInUse, EndpointError
from fdshare.kernel import listen


def main() -> int:
    parser = argparse.ArgumentParser(description="Bind a name to a UNIX domain socket.")
    parser.add_argument("--reclaim", action="store_true", help="take over a stale name")
    parser.add_argument("path", nargs="?", default="foo.socket")
    options = parser.parse_args()
    try:
        listener = listen(options.path, reclaim=options.reclaim)
    except AddressInUse as error:
        print(f"bind failed: {os.strerror(errno.EADDRINUSE)}", file=sys.stderr)
        if error.reason.startswith("a stale socket"):
            name = shlex.quote(options.path)
            print("A stale socket: the process that bound it is gone.", file=sys.stderr)
            print(
                f"Remove the file (rm {name}), or take the name over: "
                f"python bind_name.py --reclaim {name}",
                file=sys.stderr,
            )
        else:
            print(error.reason, file=sys.stderr)
        return 1
    except EndpointError as error:
        print(f"bind_name.py: {error}", file=sys.stderr)
        return 1
    print(f"UNIX domain socket bound to {options.path}")
    # Listener.close() removes the name. Here the name stays: only the descriptors close.
    sock, lock = listener.detach()
    sock.close()
    if lock is not None:
        lock.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
