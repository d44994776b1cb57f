"""Clients beside the measured one, in a process of their own.

Usage: clients.py idle PATH COUNT          connects COUNT times, says "ready", keeps them
       clients.py active PATH NAME COUNT   forks COUNT clients; for every line "SECONDS" on its
                                           input they fetch NAME for so long, and it answers
                                           "FETCHES MEDIAN-NS PROCESSOR-NS"
"""

from __future__ import annotations

import os
import signal
import socket
import statistics
import struct
import sys
from time import perf_counter_ns, process_time_ns

from fdshare import connect

_COUNTS = struct.Struct("QQQ")


def idle(path: str, count: int) -> None:
    clients = [connect(path) for _ in range(count)]  # each has sent a request to the server
    print("ready", flush=True)
    sys.stdin.read()
    for client in clients:
        client.close()


def active(path: str, name: str, count: int) -> None:
    ends = []
    for _ in range(count):
        ours, theirs = socket.socketpair()
        if os.fork() == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            ours.close()
            fetcher(path, name, theirs)
            os._exit(0)
        theirs.close()
        ends.append(ours)
    for end in ends:
        end.recv(1)
    print("ready", flush=True)
    for line in sys.stdin:
        for end in ends:
            end.send(struct.pack("d", float(line)))
        told = [_COUNTS.unpack(end.recv(_COUNTS.size)) for end in ends]
        counts, medians, used = zip(*told, strict=True)
        print(sum(counts), int(statistics.median(medians)), sum(used), flush=True)
    for end in ends:
        end.close()
    for _ in ends:
        os.wait()


def fetcher(path: str, name: str, orders: socket.socket) -> None:
    with connect(path) as client:
        client.fetch(name).close()
        orders.send(b"\1")
        while order := orders.recv(8):
            until = perf_counter_ns() + int(struct.unpack("d", order)[0] * 1e9)
            took = []
            used = process_time_ns()
            now = perf_counter_ns()
            while now < until:
                client.fetch(name).close()
                then, now = now, perf_counter_ns()
                took.append(now - then)
            used = process_time_ns() - used
            orders.send(_COUNTS.pack(len(took), int(statistics.median(took)), used))


if __name__ == "__main__":
    kind, path, *rest = sys.argv[1:]
    if kind == "idle":
        idle(path, int(rest[0]))
    else:
        active(path, rest[0], int(rest[1]))
