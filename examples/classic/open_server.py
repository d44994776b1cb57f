"""The open server: opens files for others, with its own rights, where its policy allows it.

In one terminal, as a user who may read the folder:

    $ python open_server.py demo.socket --allow 1000:/srv/reports:r --allow any:/srv/inbox:ra
    listening on demo.socket
    pid 5001, uid 1000: open r /srv/reports/may.txt: opened
    pid 5002, uid 1000: open r /etc/shadow: refused, no rule allows uid 1000 to open it for r
    pid 5003, uid 1000: refused, the request is not: open MODE PATH

and in another what open_client.py shows. A rule is UID:FOLDER:MODES, UID a number or `any`, MODES
letters out of r (read), w (write) and a (append). Only regular files that exist are opened. The
request is the text `open MODE PATH` and a NUL; MODE is one of the letters. A client that writes
`trace-open` gets the traceback of an error as its text. Ctrl-C ends the server.

Other users may connect only where the mode of the socket lets them, which is 600 at first. A server
that runs as root for others therefore needs --mode 666; the rules decide then.
"""

import argparse
import errno
import os
import signal
import socket
import stat
import threading
import traceback
from collections.abc import Iterator
from dataclasses import dataclass

from fdshare.errors import FdshareError
from fdshare.kernel import (
    Credentials,
    Descriptor,
    listen,
    send_err,
    send_fd,
    serv_accept,
)

LONGEST = 5000  # bytes of a request
FLAGS = {"r": os.O_RDONLY, "w": os.O_WRONLY, "a": os.O_WRONLY | os.O_APPEND}


@dataclass(frozen=True)
class Rule:
    uid: int | None  # None: anybody
    folder: str
    modes: str

    @classmethod
    def parse(cls, text: str) -> "Rule":
        uid, folder, modes = text.split(":")
        if not folder.startswith("/") or not modes or set(modes) - set(FLAGS):
            raise ValueError(text)
        return cls(None if uid == "any" else int(uid), os.path.realpath(folder), modes)

    def allows(self, uid: int, path: str, mode: str) -> bool:
        inside = os.path.commonpath([self.folder, path]) == self.folder
        return self.uid in (None, uid) and inside and mode in self.modes


class Refused(Exception):
    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def parse_request(data: bytes) -> tuple[bool, str, str]:
    """(whether it asks for tracebacks, mode, path) of a request without its NUL."""
    try:
        verb, mode, path = data.decode().split(" ", 2)
    except ValueError:  # too few words, or no UTF-8
        raise Refused(errno.EINVAL, "the request is not: open MODE PATH") from None
    if verb not in ("open", "trace-open") or mode not in FLAGS:
        raise Refused(errno.EINVAL, "the request is not: open MODE PATH")
    if not path.startswith("/"):
        raise Refused(errno.EINVAL, "the path does not start with /")
    return verb == "trace-open", mode, path


def open_allowed(rules: list[Rule], uid: int, mode: str, path: str) -> Descriptor:
    """The file, opened with this server's rights. It follows links, checks the file that it found,
    and opens that file, not the one that has its name a moment later."""
    with Descriptor(os.open(path, os.O_PATH | os.O_CLOEXEC)) as found:
        link = f"/proc/self/fd/{found.fileno()}"
        real = os.readlink(link)
        if not any(rule.allows(uid, real, mode) for rule in rules):
            raise Refused(errno.EACCES, f"no rule allows uid {uid} to open it for {mode}")
        if not stat.S_ISREG(os.fstat(found.fileno()).st_mode):
            raise Refused(errno.EINVAL, "it is not a regular file")
        return Descriptor(os.open(link, FLAGS[mode] | os.O_CLOEXEC))


def requests(conn: socket.socket) -> Iterator[bytes]:
    """Each request of the connection, without its NUL."""
    buffer = b""
    while data := conn.recv(LONGEST):
        *whole, buffer = (buffer + data).split(b"\0")
        if max(map(len, [*whole, buffer])) > LONGEST:
            raise Refused(errno.EMSGSIZE, f"the request has more than {LONGEST} bytes")
        yield from whole
    if buffer:
        raise Refused(errno.EINVAL, "the request does not end with NUL")


def say(text: str) -> None:
    # One write(2): threads that print() mix their lines, and one that has the lock of sys.stdout
    # when the program ends is a fatal error of Python.
    os.write(1, f"{text}\n".encode(errors="backslashreplace"))


def answer(conn: socket.socket, who: Credentials, rules: list[Rule], request: bytes) -> None:
    label = f"pid {who.pid}, uid {who.uid}"
    trace = False
    try:
        trace, mode, path = parse_request(request)
        label += f": open {mode} {path}"
        with open_allowed(rules, who.uid, mode, path) as file:
            send_fd(conn, file)
        say(f"{label}: opened")
    except Refused as error:
        say(f"{label}: refused, {error}")
        send_err(conn, error.status, str(error))
    except (OSError, ValueError) as error:
        if isinstance(error, ConnectionError):
            raise
        say(f"{label}: failed, {error}")
        reason = traceback.format_exc() if trace else error
        send_err(conn, getattr(error, "errno", None) or errno.EINVAL, reason)


def serve(conn: socket.socket, who: Credentials, rules: list[Rule]) -> None:
    conn.settimeout(10)  # seconds for a request; a silent client does not keep a thread
    with conn:
        try:
            for request in requests(conn):
                answer(conn, who, rules, request)
        except Refused as error:
            say(f"pid {who.pid}, uid {who.uid}: refused, {error}")
            try:
                send_err(conn, error.status, str(error))
            except OSError:
                pass
        except (OSError, FdshareError):
            pass  # the client has closed, or is silent


def main() -> None:
    parser = argparse.ArgumentParser(description="Open files for others.")
    parser.add_argument("path")
    parser.add_argument("--allow", metavar="UID:FOLDER:MODES", type=Rule.parse, action="append")
    parser.add_argument(
        "--mode",
        type=lambda text: int(text, 8),
        default=0o600,
        help="of the socket: 600 lets this user connect, 666 everybody",
    )
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with listen(options.path, mode=options.mode) as listener:
        print(f"listening on {options.path}", flush=True)
        try:
            while True:
                conn, who = serv_accept(listener)
                thread = threading.Thread(
                    target=serve, args=(conn, who, options.allow or []), daemon=True
                )
                thread.start()
        except KeyboardInterrupt:
            pass


if __name__ == "__main__":
    main()
