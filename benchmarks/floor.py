"""The floor: kernel and interpreter move one descriptor through one socket, and nothing else.

Every exchange sends 31 bytes and receives 61 bytes and a descriptor, which is closed: the sizes of
a fetch and its answer. The first row is what C needs. The others show what bare Python adds to it,
and what a server adds that waits for many clients and looks up a name.
"""

from __future__ import annotations

from benchmarks.measure import Bench, NotHere
from benchmarks.processes import bare_python, c_pingpong, held_file

C = "bare C: sendmsg, recvmsg, close"
PYTHON = "bare Python: sendmsg, recvmsg, close"
EPOLL = "bare Python, server with epoll and a dict"


def run(bench: Bench) -> None:
    fd = bench.keep(held_file())
    sides = {
        PYTHON: bench.keep(bare_python("plain", fd)),
        EPOLL: bench.keep(bare_python("epoll", fd)),
    }
    try:
        sides[C] = bench.keep(c_pingpong(bench.folder(), fd))
    except NotHere as error:
        bench.absent(C, error)
    times = bench.alternate(sides)
    if C in sides:
        bench.ratio(times, C, PYTHON)
        bench.ratio(times, PYTHON, C)
    bench.ratio(times, EPOLL, PYTHON)
