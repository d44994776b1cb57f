"""Three stages, each a process, hand one open file along by queues, and each writes its part.

    $ python pipeline.py report.txt
    collect (pid 4041) wrote 3 lines
    sort (pid 4042) wrote 3 lines
    sign (pid 4043) wrote 1 line
    report.txt has 7 lines

No stage knows a name or opens anything. What the next one gets is the open file itself: its
position is where the one before has stopped, and what that one had in its buffer was written when
it put the file into the queue. Each stage closes its own copy when it has handed the file on.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import fdshare

NUMBERS = (3, 1, 2)


def collect(report: IO[str]) -> None:
    for number in NUMBERS:
        report.write(f"measured {number}\n")


def sort(report: IO[str]) -> None:
    report.writelines(f"sorted {number}\n" for number in sorted(NUMBERS))


def sign(report: IO[str]) -> None:
    report.write("signed\n")


STAGES: tuple[Callable[[IO[str]], None], ...] = (collect, sort, sign)


def stage(work: Callable[[IO[str]], None], before: Any, after: Any) -> None:
    """A process: takes each report from *before*, does its work, and gives it to *after*."""
    while (item := before.get()) is not None:
        report, history = item
        with report:
            start = report.tell()
            work(report)
            report.flush()
            lines = _lines(report, start)
            history.append(f"{work.__name__} (pid {os.getpid()}) wrote {lines}")
            after.put((report, history))
    after.put(None)


def _lines(report: IO[str], start: int) -> str:
    written = os.pread(report.fileno(), report.tell() - start, start)
    count = written.count(b"\n")
    return f"{count} line{'s' if count > 1 else ''}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Hand one open file through three processes.")
    parser.add_argument("report", type=Path, nargs="+")
    parser.add_argument("--method", default="spawn", choices=["fork", "spawn", "forkserver"])
    options = parser.parse_args()

    context = fdshare.get_context(options.method)
    queues = [context.Queue() for _ in range(len(STAGES) + 1)]
    processes = [
        context.Process(target=stage, args=(work, queues[index], queues[index + 1]))
        for index, work in enumerate(STAGES)
    ]
    for process in processes:
        process.start()

    for path in options.report:
        with open(path, "w+") as report:
            queues[0].put((report, []))
    queues[0].put(None)
    for path in options.report:
        report, history = queues[-1].get()
        report.close()
        print(*history, sep="\n")
        print(f"{path} has {len(path.read_text().splitlines())} lines")
    for process in processes:
        process.join()


if __name__ == "__main__":
    main()
