"""Workers of a Dask cluster share one open data set and one listener, by reference.

    $ pip install '.[cluster]'
    $ python cluster_dask.py
    4 tasks in 2 processes summed 1000000 numbers of one open file: 499999500000.0
    each of 2 workers has accepted a connection on port 40123

This program starts a rendezvous server, opens the data and the listener, and registers both. The
cluster moves *references*: a name, a path, and the boot id of the machine. A plugin resolves them
once in every worker, so a task has the open file, mapped, and the page cache holds it once for all
workers. The scheduler copies no data.

A descriptor cannot leave its machine. In a cluster of many machines each one runs a rendezvous
server, and the plugin's setup opens what the machine does not hold yet (see docs/howto/cluster.md).
A reference of another machine raises ForeignHost.
"""

from __future__ import annotations

import array
import mmap
import os
import socket
import tempfile

from distributed import Client, LocalCluster, Worker, WorkerPlugin, get_worker

import fdshare

NUMBERS = 1_000_000
WORKERS = 2


class Shared(WorkerPlugin):
    """Gives a worker the data set, mapped read-only, and the listener."""

    name = "shared"

    def __init__(self, data: fdshare.Ref, listener: fdshare.Ref) -> None:
        self.references = data, listener

    def setup(self, worker: Worker) -> None:
        data, listener = self.references
        with data.fetch() as file:
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.numbers = memoryview(self.map).cast("d")
        self.listener = listener.fetch()

    def teardown(self, worker: Worker) -> None:
        self.numbers.release()
        self.map.close()
        self.listener.close()


def shared() -> Shared:
    """The plugin of this worker."""
    plugin = get_worker().plugins[Shared.name]
    assert isinstance(plugin, Shared)
    return plugin


def partial_sum(start: int, stop: int) -> tuple[int, float]:
    return os.getpid(), sum(shared().numbers[start:stop])


def accept_one() -> int:
    """Answers one connection; the workers share the queue of the listener."""
    connection, _ = shared().listener.accept()
    with connection:
        connection.sendall(str(os.getpid()).encode())
    return os.getpid()


def main() -> None:
    with tempfile.TemporaryFile() as data, socket.create_server(("127.0.0.1", 0)) as listener:
        array.array("d", range(NUMBERS)).tofile(data)
        with fdshare.Manager() as rendezvous:
            rendezvous.register("numbers", data)
            rendezvous.register("listener", listener)
            plugin = Shared(
                fdshare.ref("numbers", rendezvous.address),
                fdshare.ref("listener", rendezvous.address),
            )
            compute(plugin, listener.getsockname()[1])


def compute(plugin: Shared, port: int) -> None:
    with (
        LocalCluster(
            n_workers=WORKERS, threads_per_worker=1, host="127.0.0.1", dashboard_address=None
        ) as cluster,
        Client(cluster) as client,
    ):
        client.register_plugin(plugin)
        workers = list(client.scheduler_info()["workers"])

        step = NUMBERS // 4
        starts = range(0, NUMBERS, step)
        parts = [
            client.submit(partial_sum, start, start + step, workers=workers[i % WORKERS])
            for i, start in enumerate(starts)
        ]
        results = client.gather(parts)
        total, processes = sum(part for _, part in results), {pid for pid, _ in results}
        print(
            f"{len(parts)} tasks in {len(processes)} processes summed {NUMBERS} numbers of one "
            f"open file: {total}"
        )

        accepting = [client.submit(accept_one, workers=worker, pure=False) for worker in workers]
        answered = {call(port) for _ in workers}
        assert answered == set(client.gather(accepting)) == processes
        print(f"each of {len(answered)} workers has accepted a connection on port {port}")


def call(port: int) -> int:
    with socket.create_connection(("127.0.0.1", port)) as connection:
        return int(connection.recv(100))


if __name__ == "__main__":
    main()
