"""A data set in shared memory that is replaced under running readers: none sees half of each.

    $ fdshare serve /tmp/demo.sock &
    $ python hot_dataset.py /tmp/demo.sock publish 1
    version 1: 1000000 numbers

    $ python hot_dataset.py /tmp/demo.sock read &
    version 1
    $ python hot_dataset.py /tmp/demo.sock publish 2
    version 2: 1000000 numbers
    version 2

    $ kill %2
    20480 reads of 2 versions, 0 torn

All processes have the same memory, and nothing is copied to a reader. A version is sealed, so
nobody changes it; it is freed when the last reader has gone on to the next one. To look whether
there is a newer one costs a comparison, so a reader looks before each read.
"""

from __future__ import annotations

import argparse
import signal
from typing import Any

import numpy

import fdshare

NAME = "dataset"


def publish(client: fdshare.Client, version: int, size: int) -> None:
    """Registers *size* numbers that are all *version*: so a reader can tell a mixture."""
    data = fdshare.shared_copy(numpy.full(size, version))
    client.register(NAME, data, replace=True)
    print(f"version {version}: {size} numbers")


def read(client: fdshare.Client) -> None:
    ended = False

    def end(number: int, frame: Any) -> None:
        nonlocal ended
        ended = True

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    reads = torn = 0
    versions: list[int] = []
    with client.follow(NAME) as dataset:
        while not ended:
            data = dataset.current  # the whole of the newest version
            first, last = int(data.min()), int(data.max())
            reads += 1
            torn += first != last
            if first not in versions:
                versions.append(first)
                print(f"version {first}", flush=True)
    print(f"{reads} reads of {len(versions)} versions, {torn} torn")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", help="where the server of fdshare listens")
    actions = parser.add_subparsers(dest="action", required=True)
    publisher = actions.add_parser("publish")
    publisher.add_argument("version", type=int)
    publisher.add_argument("--size", type=int, default=1_000_000)
    actions.add_parser("read")
    options = parser.parse_args()
    with fdshare.connect(options.path) as client:
        if options.action == "publish":
            publish(client, options.version, options.size)
        else:
            read(client)


if __name__ == "__main__":
    main()
