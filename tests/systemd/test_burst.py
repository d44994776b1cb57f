"""Both halves die again and again under load, while systemd reloads and executes itself anew."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from fdshare.errors import FdshareError

from .service import Service, systemctl

DEATHS = 25 if os.environ.get("FDSHARE_CHAOS") == "long" else 8
WRITERS = 3


class Writer:
    """Changes entries of its own as fast as it can, and knows what must be there."""

    def __init__(self, service: Service, number: int) -> None:
        self.held: dict[str, str] = {}  # name -> what its memfd is called
        self.done = 0
        self.failures: list[str] = []
        self._client = service.client(timeout=60, reconnect=60)
        self._prefix = f"writer-{number}"
        self._random = random.Random(number)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._change()
                self.done += 1
            except (FdshareError, OSError) as error:
                self.failures.append(repr(error))
                return

    def _change(self) -> None:
        name = f"{self._prefix}/{self._random.randrange(8)}"
        if name in self.held and self._random.random() < 0.3:
            self._client.unregister(name)
            del self.held[name]
        elif name in self.held and self._random.random() < 0.2:
            self._client.take(name).close()
            del self.held[name]
        else:
            content = f"{name}-{self.done}".replace("/", "-")
            with open(os.memfd_create(content), "rb") as file:
                self._client.register(name, file, replace=True)
                if self._random.random() < 0.3:  # a second name of one open file
                    self._client.register(f"{name}/too", file, replace=True)
                    self.held[f"{name}/too"] = content
            self.held[name] = content

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()
        self._client.close()


@contextmanager
def writing(service: Service) -> Iterator[list[Writer]]:
    writers = [Writer(service, number) for number in range(WRITERS)]
    for writer in writers:
        writer.start()
    try:
        yield writers
    finally:
        for writer in writers:
            writer.stop()


def contents(service: Service) -> dict[str, str]:
    """What each name's memfd is called."""
    found = {}
    with service.client() as client:
        for name in client.names():
            (descriptor,) = client.fetch_raw(name)
            with descriptor:
                target = os.readlink(f"/proc/self/fd/{descriptor.fileno()}")
            found[name] = target.removeprefix("/memfd:").removesuffix(" (deleted)")
    return found


def test_a_burst_of_deaths_loses_nothing(service: Service) -> None:
    service.dropin(serve="--log-level warning")
    with writing(service) as writers:
        for number in range(DEATHS):
            done = [writer.done for writer in writers]
            if number % 3:
                systemctl("daemon-reload" if number % 3 == 1 else "daemon-reexec", "--no-block")
            service.kill_both()
            assert all(writer.failures == [] for writer in writers)
            assert [writer.done for writer in writers] != done
    assert [writer.failures for writer in writers] == [[]] * WRITERS
    expected = {name: content for writer in writers for name, content in writer.held.items()}
    assert contents(service) == expected
    # And nothing is left of what is gone.
    assert service.stored() == len(set(expected.values())) + 2
