"""A UNIX socket beside TCP over the loopback interface: the same two processes, the same data.

    $ python unix_and_tcp.py
    what              UNIX       TCP     UNIX is
    round trip     17.6 us   24.0 us   1.4 times as fast
    throughput    3.2 GB/s  1.1 GB/s   3.0 times as fast

A round trip is one byte there and one back; the throughput is that of writes of 64 KiB. The two are
measured in turn, several times, and the median of each is shown. The numbers are those of one
machine: look at the ratio. With --short it measures less, in less time.
"""

import argparse
import os
import socket
import statistics
import time

CHUNK = 65536


def unix_pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    for sock in (near, far):  # do not wait for more data before a packet is sent
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return near, far


def with_child(pair: tuple[socket.socket, socket.socket], amount: int, size: int) -> float:
    """Seconds in which a child process answers *amount* messages of *size* bytes: each of one byte
    with one, and longer ones with one byte after the last."""
    near, far = pair
    pid = os.fork()
    if pid == 0:
        near.close()
        buffer = memoryview(bytearray(CHUNK))
        left = amount * size
        while left:
            left -= far.recv_into(buffer)
            if size == 1 or not left:
                far.send(b".")
        os._exit(0)
    far.close()
    data = bytes(size)
    with near:
        started = time.perf_counter()
        for _ in range(amount):
            near.sendall(data)
            if size == 1:
                near.recv(1)
        if size > 1:
            near.recv(1)
        seconds = time.perf_counter() - started
    os.waitpid(pid, 0)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare UNIX sockets with TCP.")
    parser.add_argument("--short", action="store_true")
    short = parser.parse_args().short
    turns, trips, chunks = (3, 200, 200) if short else (9, 5000, 10000)
    print(f"{'what':12} {'UNIX':>9} {'TCP':>9}     UNIX is")
    for what, amount, size in (("round trip", trips, 1), ("throughput", chunks, CHUNK)):
        times: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(turns):  # in turn: what else the machine does meets both
            for is_unix, pair in ((True, unix_pair), (False, tcp_pair)):
                times[is_unix].append(with_child(pair(), amount, size) / amount)
        unix, tcp = statistics.median(times[True]), statistics.median(times[False])
        if size == 1:
            cells = [f"{seconds * 1e6:.1f} us" for seconds in (unix, tcp)]
        else:
            cells = [f"{size / seconds / 1e9:.1f} GB/s" for seconds in (unix, tcp)]
        print(f"{what:12} {cells[0]:>9} {cells[1]:>9}   {tcp / unix:.1f} times as fast")


if __name__ == "__main__":
    main()
