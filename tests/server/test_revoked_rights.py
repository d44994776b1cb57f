"""A policy is reloaded: what began under the old one, and waits, goes on only if the new one allows
it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import anyio._backends._asyncio  # another user may not be able to read it
import pytest
from breaking import Wire, kill
from conftest import wait_until
from users import AsUser, Say, needs_root

from fdshare.client.asynchronous.client import AsyncClient
from fdshare.client.blocking.client import Client
from fdshare.errors import AccessDenied, FdshareError
from fdshare.protocol import messages as m

pytestmark = needs_root
LOSES, KEEPS = 1501, 1502
RULES = """
[[rule]]
effect = "allow"
verbs = ["fetch", "take"]
users = [{0}]
names = ["secret/*"]
[[rule]]
effect = "allow"
verbs = ["watch"]
users = [{0}]
"""


@pytest.fixture
def root(folder: Path, small: Callable[..., Client]) -> Client:
    """A client of a server whose policy allows `LOSES` and `KEEPS` the same."""
    folder.chmod(0o755)
    policy = folder / "policy"
    policy.write_text(RULES.format(LOSES) + RULES.format(KEEPS))
    return small(1024, "--policy", str(policy), "--mode", "0666")


def revoke(root: Client) -> None:
    """Writes the policy that leaves `KEEPS` his rights, and `LOSES` none."""
    folder = Path(root.address).parent
    (folder / "policy").write_text(RULES.format(KEEPS))


def waits(address: str) -> Callable[[Say], Wire]:
    """A task that waits in each way, and then says what it is answered."""

    def task(say: Say) -> Wire:
        wire = Wire(address)
        requests = (m.Fetch("secret/f", None), m.Wait("secret/w", 60.0), m.Take("secret/t", None))
        for id, request in enumerate((*requests, m.Watch("*"), m.Ping()), 1):
            wire.send(id, request)
        assert [wire.receive().id for _ in range(2)] == [4, 5]
        say("waits")
        for _ in range(4):
            said = wire.receive()
            name = getattr(said.reply, "code", type(said.reply).__name__)
            say(f"{said.id} {name} {len(said.descriptors)}")
        wire.ask(6, m.Ping())
        say("nothing more")
        return wire

    return task


def publish(root: Client) -> None:
    for name in "fwt":
        root.register(f"secret/{name}", 0)


ENDED = {"1 access_denied 0", "2 access_denied 0", "3 access_denied 0", "4 access_denied 0"}


def test_what_waits_ends_with_the_right(root: Client) -> None:
    with AsUser(LOSES, waits(root.address)) as loses, AsUser(KEEPS, waits(root.address)) as keeps:
        assert loses.hear() == keeps.hear() == "waits"
        revoke(root)
        root.reload()
        assert {loses.hear() for _ in range(4)} == ENDED
        publish(root)
        assert loses.hear() == "nothing more"
        assert [keeps.hear() for _ in range(2)] == ["0 Event 0", "1 Given 1"]
    wait_until(lambda: sorted(root.names()) == ["secret/f", "secret/t", "secret/w"])


def asynchronously(address: str) -> Callable[[Say], None]:
    """A task whose AsyncClient waits in each way, and says the errors."""

    async def wait(say: Say) -> None:
        async with AsyncClient(address) as client, anyio.create_task_group() as group:
            watcher = client.watch("*")
            await anext(watcher)
            calls: list[Callable[[], Any]] = [
                lambda: client.fetch("secret/f", timeout=None),
                lambda: client.wait("secret/w"),
                lambda: client.take("secret/t", timeout=60),
                lambda: anext(watcher),
            ]

            async def call(index: int) -> None:
                try:
                    await calls[index]()
                except FdshareError as error:
                    say(f"{index + 1} {error.code} 0")

            for index in range(4):
                group.start_soon(call, index)
            await anyio.wait_all_tasks_blocked()
            await client.ping()
            say("waits")

    return lambda say: anyio.run(wait, say)


def test_what_waits_ends_for_an_asynchronous_client(root: Client) -> None:
    with AsUser(LOSES, asynchronously(root.address)) as loses:
        assert loses.hear() == "waits"
        revoke(root)
        root.reload()
        assert {loses.hear() for _ in range(4)} == ENDED


def test_a_blocking_watch_ends_with_the_right(root: Client) -> None:
    def watch(say: Say) -> None:
        with Client(root.address) as client, client.watch("secret/*") as watcher:
            next(watcher)
            say("watches")
            for _ in range(2):  # and the next one does not begin
                try:
                    next(watcher)
                except AccessDenied as error:
                    say(f"may not {error.verb}")

    with AsUser(LOSES, watch) as loses:
        assert loses.hear() == "watches"
        revoke(root)
        root.reload()
        publish(root)
        assert [loses.hear() for _ in range(2)] == ["may not watch"] * 2


def test_the_policy_of_a_signal_reaches_the_successor_of_a_dead_server(root: Client) -> None:
    """The server dies before it reads that it is to reload."""
    stats = root.stats()
    assert stats.keeper_pid is not None
    os.kill(stats.server_pid, signal.SIGSTOP)
    revoke(root)
    os.kill(stats.keeper_pid, signal.SIGHUP)
    kill(stats.server_pid)
    wait_until(lambda: not root.explain("fetch", "secret/f", LOSES, LOSES).allowed)
    assert root.explain("fetch", "secret/f", KEEPS, KEEPS).allowed
    # That one has reloaded, so the next one does not.
    (Path(root.address).parent / "policy").write_text("")
    kill(root.stats().server_pid)
    assert root.explain("fetch", "secret/f", KEEPS, KEEPS).allowed
