"""One open file in many processes: they share the offset, as two descriptors of one process do.

    $ python fd_to_many.py
    parent 5000 opened a file of 5 records
    worker 5001 read 'record 0' at offset 0
    worker 5002 read 'record 1' at offset 9
    worker 5003 read 'record 2' at offset 18
    worker 5004 read 'record 3' at offset 27
    worker 5005 read 'record 4' at offset 36
    parent 5000, which read nothing, is at offset 45

The workers are not forks of the parent: each is a new program in a session of its own. It knows the
path of the socket, and receives the descriptor there. None of them can open the file, because it
has no name any more. The order of the workers may differ; no record is read twice and none is left
out. Another number of workers may be given as the argument.
"""

import os
import subprocess
import sys
import tempfile

from fdshare.kernel import cli_conn, recv_fd, send_fd, serv_accept, serv_listen

RECORD = 9  # bytes, with the newline


def worker(path: str) -> None:
    with cli_conn(path) as conn, recv_fd(conn) as file:
        text = os.read(file.fileno(), RECORD).decode().rstrip()
        offset = os.lseek(file.fileno(), 0, os.SEEK_CUR) - RECORD
        print(f"worker {os.getpid()} read {text!r} at offset {offset}", flush=True)
        conn.sendall(b".")  # the next worker may read


def parent(count: int) -> None:
    with tempfile.TemporaryFile() as file, tempfile.TemporaryDirectory() as folder:
        file.write(b"".join(b"record %d\n" % number for number in range(count)))
        file.seek(0)
        print(f"parent {os.getpid()} opened a file of {count} records", flush=True)
        path = os.path.join(folder, "socket")
        with serv_listen(path) as listener:
            command = [sys.executable, __file__, "--worker", path]
            workers = [subprocess.Popen(command, start_new_session=True) for _ in range(count)]
            for _ in workers:
                conn, _who = serv_accept(listener)
                with conn:
                    send_fd(conn, file)
                    conn.recv(1)
            for process in workers:
                process.wait()
        offset = os.lseek(file.fileno(), 0, os.SEEK_CUR)
        print(f"parent {os.getpid()}, which read nothing, is at offset {offset}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2])
    else:
        parent(min(int(sys.argv[1]) if len(sys.argv) > 1 else 5, 10))
