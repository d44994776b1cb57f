"""Three hostile users do all they can at once, for a while; another user and root notice nothing.

They come twice: what the first wave has left would show in the second. How long a fetch takes
meanwhile depends on the machine, too: a descriptor that two other processes exchange, at the same
moments, tells how much. And for how long the server's process runs before the answer to a fetch
depends on the server alone: that is not ten times what a fetch takes without hostile users.
"""

from __future__ import annotations

import array
import json
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from breaking import Halves, resident
from conftest import census, wait_until
from server.conftest import small  # noqa: F401
from users import AsUser, needs_root

from chaos.attacks import ATTACKS, Attacker, attack
from chaos.conftest import LONG
from fdshare.client.blocking.client import Client

pytestmark = needs_root
HOSTILE, GOOD = (1501, 1502, 1503), 1504
SECONDS = 150 if LONG else 5  # of a wave
GROWTH = 64 << 20  # bytes: what one user may have kept; the allocator keeps some of what was freed
FETCHES = 10  # of the good user, for each other thing that it does
PAUSE = 0.002  # seconds between two of them: it is not the load
TIMEOUT = 30  # seconds; whoever needs longer was refused
SLOWER = 10  # times as long may a fetch take as without hostile users, at the 99th percentile
RULES = "".join(
    f"""
[[rule]]
effect = "allow"
verbs = ["register", "fetch", "take", "unregister", "info", "bind", "explain"]
users = [{uid}]
names = ["{uid}/*"]
addresses = ["tcp://127.0.0.1:*"]
[[rule]]
effect = "allow"
verbs = ["list", "watch", "stats"]
users = [{uid}]
"""
    for uid in (*HOSTILE, GOOD)
)


class Times:
    """How long each call took, by the clock *by*: time.CLOCK_MONOTONIC, or that of a process."""

    def __init__(self, by: int) -> None:
        self._by = by
        self._took: list[float] = []

    @contextmanager
    def take(self) -> Iterator[None]:
        began = time.clock_gettime(self._by)
        yield
        self._took.append(time.clock_gettime(self._by) - began)

    def __len__(self) -> int:
        return len(self._took)

    def quantiles(self, what: str) -> dict[str, int]:
        """The median and the 99th percentile, in microseconds."""
        at = {"median": 50, "p99": 99}
        took = sorted(self._took)
        return {f"{what}_{q}_us": round(took[len(took) * n // 100] * 1e6) for q, n in at.items()}


def clock_of(pid: int) -> int:
    """The clock of how long the process has run (CPUCLOCK_SCHED, <linux/posix-timers.h>)."""
    return (~pid << 3) | 2


@contextmanager
def bare_exchange() -> Iterator[Callable[[], None]]:
    """A call that gets a descriptor from another process which does nothing else."""
    mine, theirs = socket.socketpair()
    if not (pid := os.fork()):
        try:
            mine.close()
            while data := theirs.recv(64):
                theirs.sendmsg(
                    [data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0]))]
                )
        finally:
            os._exit(0)
    theirs.close()

    def exchange() -> None:
        mine.sendall(bytes(31))
        _, control, _, _ = mine.recvmsg(64, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC)
        os.close(array.array("i", control[0][2])[0])

    with mine:
        yield exchange
    os.waitpid(pid, 0)


def behave(address: str, seconds: float) -> dict[str, Any]:
    """Registers, fetches, takes, now and then on a new connection: what went wrong, and how long
    fetches and bare exchanges took."""
    wrong: Counter[str] = Counter()
    ends = time.monotonic() + seconds
    with Client(address, timeout=TIMEOUT) as client, bare_exchange() as exchange:
        clock = clock_of(client.stats().server_pid)
        fetch, bare = Times(time.CLOCK_MONOTONIC), Times(time.CLOCK_MONOTONIC)
        server = Times(clock)
        client.register(f"{GOOD}/kept", 0)
        while time.monotonic() < ends:
            try:
                for _ in range(FETCHES):
                    with fetch.take(), server.take():
                        client.fetch_raw(f"{GOOD}/kept")[0].close()
                    with bare.take():
                        exchange()
                    time.sleep(PAUSE)
                name = f"{GOOD}/{len(fetch)}"
                client.register(name, 0)
                client.info(name)
                client.take_raw(name)[0].close()
                if not len(fetch) % (50 * FETCHES):
                    with Client(address, timeout=TIMEOUT) as other:
                        other.fetch_raw(f"{GOOD}/kept")[0].close()
            except Exception as error:
                wrong[f"{type(error).__name__}: {error}"[:200]] += 1
        client.unregister(f"{GOOD}/kept")
    times = {**fetch.quantiles("fetch"), **server.quantiles("server"), **bare.quantiles("bare")}
    return {"wrong": wrong, "fetches": len(fetch), **times}


class Wave:
    """A while of it: what root, another user and whoever reads the metrics saw."""

    def __init__(self, root: Client, metrics: int, seconds: float, *, hostile: bool) -> None:
        self.most: Counter[str] = Counter()
        self.wrong: Counter[str] = Counter()
        address, limits = str(root.address), root.stats().limits
        with ExitStack() as stack:

            def start(uid: int, task: Callable[[], Any]) -> AsUser:
                return stack.enter_context(AsUser(uid, lambda say: say(json.dumps(task()))))

            good = start(GOOD, lambda: behave(address, seconds))
            others = []
            for uid in HOSTILE:
                attacker = Attacker(address, str(uid), limits, metrics)
                others.append(start(uid, partial(attack if hostile else spin, attacker, seconds)))
                # What they take of the processors is not what is asked here.
                os.setpriority(os.PRIO_PROCESS, others[-1].pid, 19)
            ends = time.monotonic() + seconds
            while time.monotonic() < ends:
                self._look(root, metrics)
                time.sleep(0.05)
            self.good = json.loads(good.hear(2 * TIMEOUT))
            attacks = (json.loads(other.hear(2 * TIMEOUT)) for other in others)
            self.attacks = sum(map(Counter, attacks), Counter())
        self.wrong.update(self.good.pop("wrong"))

    def _look(self, root: Client, metrics: int) -> None:
        try:
            root.register("root's", 0, replace=True)
            root.fetch_raw("root's")[0].close()
            stats = root.stats()
            with closing(HTTPConnection("127.0.0.1", metrics, timeout=TIMEOUT)) as scraper:
                scraper.request("GET", "/metrics")
                assert b"fdshare_connections" in scraper.getresponse().read()
        except Exception as error:
            self.wrong[f"root: {type(error).__name__}: {error}"[:200]] += 1
            return
        for half, pid in (("server", stats.server_pid), ("keeper", stats.keeper_pid)):
            assert pid is not None
            for what, now in (("fds", len(census(pid))), ("mb", resident(pid) >> 20)):
                self.most[f"{half}_{what}"] = max(self.most[f"{half}_{what}"], now)


def spin(attacker: Attacker, seconds: float) -> Counter[str]:
    """What takes as much of the processors as an attacker, and does no harm."""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        pass
    return Counter()


@pytest.mark.timeout(3 * SECONDS + 300)
@pytest.mark.parametrize("nofile", [1024, 20_000])
def test_hostile_users(
    small: Callable[..., Client],  # noqa: F811
    folder: Path,
    counted: dict[str, Any],
    nofile: int,
) -> None:
    folder.chmod(0o755)
    (folder / "policy").write_text(RULES)
    with socket.create_server(("127.0.0.1", 0)) as free:
        metrics = free.getsockname()[1]
    options = ("--policy", str(folder / "policy"), "--mode", "0666")
    root = small(nofile, *options, "--metrics", f"127.0.0.1:{metrics}")
    halves = Halves(root)
    halves.redundant()
    pids = halves.pids()
    quiet = Wave(root, metrics, SECONDS / 5, hostile=False)
    empty(root)
    before = {half: len(census(pid)) for half, pid in pids.items()}
    memory = []
    for _ in range(2):
        wave = Wave(root, metrics, SECONDS, hostile=True)
        counted.update(wave.good, **wave.most)
        assert not wave.wrong, wave.wrong
        assert {one.__name__ for one in ATTACKS} <= set(wave.attacks)
        empty(root)
        for half, pid in pids.items():
            wait_until(lambda h=half, p=pid: len(census(p)) == before[h], f"census of the {half}")
        memory.append([resident(pid) for pid in pids.values()])
    counted.update({f"quiet_{what}": number for what, number in quiet.good.items()})
    counted.update(wave.attacks)
    assert halves.pids() == pids
    for first, second in zip(*memory, strict=True):
        assert second < first + GROWTH
    if LONG:  # in seconds there are too few fetches for a 99th percentile
        before_p99, machine_p99 = quiet.good["fetch_p99_us"], wave.good["bare_p99_us"]
        assert wave.good["server_p99_us"] < SLOWER * before_p99, counted
        assert wave.good["fetch_p99_us"] < SLOWER * max(before_p99, machine_p99), counted


def empty(root: Client) -> None:
    """Returns when all others are gone, and nothing is held any more."""

    def is_empty() -> bool:
        for name in root.names():
            root.unregister(name)
        return not root.infos() and root.stats().connections == 1

    wait_until(is_empty, "all others to be gone")
