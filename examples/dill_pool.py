"""A lambda that closes over an open file, and runs in a pool of `multiprocess`, dill's fork of
multiprocessing.

    $ python dill_pool.py
    worker 4041 read 8 bytes at 0: b'line 000'
    worker 4042 read 8 bytes at 9: b'line 001'
    worker 4041 read 8 bytes at 18: b'line 002'
    worker 4042 read 8 bytes at 27: b'line 003'
    the file was unlinked before the workers saw it

dill pickles lambdas and closures, but it pickles an open file by its *name*, and the receiver opens
the file that has this name then. With `fdshare.get_context(backend="multiprocess")` the workers get
the same open file.
"""

from __future__ import annotations

import argparse
import os
import tempfile

import fdshare


def main() -> None:
    parser = argparse.ArgumentParser(description="Read one unlinked file in several processes.")
    parser.add_argument("--method", default="spawn", choices=["fork", "spawn", "forkserver"])
    options = parser.parse_args()

    context = fdshare.get_context(options.method, backend="multiprocess")
    with tempfile.NamedTemporaryFile("w+b", delete=False) as named:
        file = named.file
        file.write(b"".join(b"line %03d\n" % number for number in range(100)))
        os.unlink(named.name)

        # pread() does not move the offset, which all holders of the file share.
        def read(offset: int) -> tuple[int, bytes]:
            return os.getpid(), os.pread(file.fileno(), 8, offset)

        with context.Pool(2) as pool:
            offsets = range(0, 36, 9)
            results = pool.imap(lambda offset: (offset, *read(offset)), offsets)
            for offset, pid, data in results:
                print(f"worker {pid} read {len(data)} bytes at {offset}: {data!r}")
            pool.close()
            pool.join()
    print("the file was unlinked before the workers saw it")


if __name__ == "__main__":
    main()
