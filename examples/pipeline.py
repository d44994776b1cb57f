"""Three stages, each a process, pass one open file along by queues, and each writes its part.

    $ python pipeline.py report.txt
    collect (pid 4041) wrote 3 lines
    sort (pid 4042) wrote 3 lines
    sign (pid 4043) wrote 1 line
    report.txt has 7 lines

No stage knows a name or opens a file. The next one gets the open file itself. Its position is where
the stage before has stopped, because `put` writes the buffer of that stage to the file. Each stage
closes its own copy when it has passed the file on.
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
    """A process: gets each report from *before*, does its work, and puts it into *after*."""
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
