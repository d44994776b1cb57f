"""A log that is rotated while programs write to it: without a signal, without reopening.

    $ fdshare serve /tmp/demo.sock &
    $ python log_rotation.py /tmp/demo.sock rotate /tmp/demo.log
    generation 1 is /tmp/demo.log

    $ python log_rotation.py /tmp/demo.sock write &
    pid 4022 writes
    $ python log_rotation.py /tmp/demo.sock write &
    pid 4023 writes
    $ python log_rotation.py /tmp/demo.sock rotate /tmp/demo.log
    generation 2 is /tmp/demo.log, the one before is /tmp/demo.log.1

    $ kill %2 %3
    pid 4022 wrote 5120 lines to 2 files
    pid 4023 wrote 5042 lines to 2 files

A writer opens no file and knows no path: it may be in a container, or have no right to open one.
`log.current` is the file of now, for the price of a comparison. Once `rotate` has ended, no line
that is begun afterwards goes into the old file.
"""

from __future__ import annotations

import argparse
import os
import signal
import time
from typing import Any

import fdshare

NAME = "log"


def rotate(client: fdshare.Client, file: str) -> None:
    old = ""
    if NAME in client:
        old = f"{file}.{client.info(NAME).generation}"
        os.rename(file, old)
    # Not buffered: each write is one write(2), and O_APPEND makes it one piece of the file.
    with open(file, "ab", buffering=0) as new:
        generation = client.register(NAME, new, replace=True).generation
    print(f"generation {generation} is {file}" + (f", the one before is {old}" if old else ""))


def write(client: fdshare.Client, pause: float) -> None:
    ended = False

    def end(number: int, frame: Any) -> None:
        nonlocal ended
        ended = True

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    lines, files = 0, set()
    with client.follow(NAME) as log:
        print(f"pid {os.getpid()} writes", flush=True)
        while not ended:
            lines += 1
            log.current.write(b"pid %d line %d\n" % (os.getpid(), lines))
            files.add(log.generation)
            time.sleep(pause)  # in place of the work that the line is about
    print(f"pid {os.getpid()} wrote {lines} lines to {len(files)} files")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", help="where the server of fdshare listens")
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("rotate").add_argument("file")
    actions.add_parser("write").add_argument("--pause", type=float, default=0.001)
    options = parser.parse_args()
    with fdshare.connect(options.path) as client:
        if options.action == "rotate":
            rotate(client, options.file)
        else:
            write(client, options.pause)


if __name__ == "__main__":
    main()
