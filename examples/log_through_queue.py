"""An open log file, sent to worker processes through a stock multiprocessing.Queue.

    $ python log_through_queue.py /tmp/app.log
    4041 wrote its lines
    4042 wrote its lines
    4043 wrote its lines
    /tmp/app.log.1 has 9 lines, /tmp/app.log has none: it is a new file

The workers do not know the file's name. All write to one open file, whose offset they share, also
after another program (logrotate; here the program itself) has renamed it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from pathlib import Path
from typing import Any

import fdshare

WORKERS = 3
LINES = 3


def work(files: Any, done: Any) -> None:
    log = files.get()
    for number in range(LINES):
        log.write(f"worker {os.getpid()}: line {number}\n")
    log.close()
    done.put(os.getpid())


def main() -> None:
    parser = argparse.ArgumentParser(description="Send an open log file through a queue.")
    parser.add_argument("log", type=Path)
    options = parser.parse_args()

    fdshare.install()
    context = multiprocessing.get_context("spawn")  # children that inherit nothing
    files, done = context.Queue(), context.Queue()
    workers = [context.Process(target=work, args=(files, done)) for _ in range(WORKERS)]
    for worker in workers:
        worker.start()

    rotated = options.log.with_name(options.log.name + ".1")
    with open(options.log, "a", buffering=1) as log:
        options.log.rename(rotated)
        options.log.touch()
        for _ in workers:
            files.put(fdshare.hold(log))  # the file may be closed as soon as this returns
    for _ in workers:
        print(f"{done.get()} wrote its lines", flush=True)
    for worker in workers:
        worker.join()
    written = rotated.read_text().splitlines()
    empty = not options.log.read_text()
    print(
        f"{rotated} has {len(written)} lines, {options.log} has {'none' if empty else 'some'}: "
        "it is a new file"
    )


if __name__ == "__main__":
    main()
