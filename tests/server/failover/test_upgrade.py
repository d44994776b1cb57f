"""New code in the place of the old: same pid, same table, nobody dropped; and code that does not
start, refuses the table, dies or hangs: the old one goes on and says why.

The server runs a copy of fdshare, and what is installed "now" is what the test makes of the copy.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from breaking import Halves, ended, identity, kill, state
from conftest import wait_until
from installed import HANGS, Installed
from nursery import Manager

from fdshare.activation import NotifySocket
from fdshare.client.blocking.client import Client
from fdshare.errors import FdshareError, InvalidArgument
from server.test_leases import Taker


@pytest.fixture
def installed(folder: Path) -> Iterator[Installed]:
    installed = Installed(folder)
    yield installed
    installed.end()


@pytest.fixture
def short_silence(installed: Installed) -> None:
    """Comes before `client`."""
    installed.wait_less(silence=5.0)


@pytest.fixture
def short_trial(installed: Installed) -> None:
    """Comes before `client`."""
    installed.wait_less(trial=3.0)


@pytest.fixture
def client(installed: Installed) -> Iterator[Client]:
    installed.start()
    with Client(installed.path) as client:
        yield client


@pytest.fixture
def halves(client: Client) -> Iterator[Halves]:
    """Both halves, accounted for at the end."""
    halves = Halves(client)
    halves.redundant()
    yield halves
    halves.redundant()
    check_census(halves)


def check_census(halves: Halves) -> None:
    """As Halves.check_census(), for a server without an owner."""
    for half in ("server", "keeper"):
        wait_until(lambda half=half: halves.excess(half) == -1, f"the census of the {half}", 5)


@pytest.fixture
def fd() -> Iterator[int]:
    fd = os.memfd_create("held")
    yield fd
    os.close(fd)


# Good code.


def test_the_new_code_serves(installed: Installed, client: Client, halves: Halves, fd: int) -> None:
    entry = client.register("a", fd, metadata={"x": "y"}, ttl=500)
    pids, stats = halves.pids(), client.stats()
    installed.name_it("second")
    client.upgrade()
    assert client.stats().notes == {"code": "second"}
    assert halves.pids()["keeper"] == pids["keeper"]
    assert halves.pids()["server"] != pids["server"]
    wait_until(lambda: ended(pids["server"]), "the old server ends")
    assert client.stats().generation == stats.generation
    assert client.stats().serial == stats.serial
    info = client.info("a")
    assert (info.generation, info.metadata) == (entry.generation, {"x": "y"})
    assert info.ttl is not None
    assert 400 < info.ttl < 500
    with client.fetch_raw("a")[0] as descriptor:
        assert identity(descriptor) == identity(fd)
    assert client.register("b", fd).generation == entry.generation + 1


def test_again_and_again(installed: Installed, client: Client, halves: Halves, fd: int) -> None:
    client.register("a", fd)
    for word in ("second", "third", "fourth"):
        installed.name_it(word)
        client.upgrade()
        assert client.stats().notes == {"code": word}
        # The same client changed something before and after: its answers are remembered.
        client.register("a", fd, replace=True)
    assert client.info("a").generation == 4


def test_it_is_carried_out_once(
    installed: Installed, client: Client, halves: Halves, fd: int
) -> None:
    """Although its answer comes from the successor, who finds it beside the table."""
    client.register("a", fd)  # there is an answer to be forgotten when the old server ends
    before = halves.pids()["server"]
    with client.watch(timeout=20) as watch:
        next(watch)
        client.upgrade()
        after = halves.pids()["server"]
        for _ in range(3):
            client.register("a", fd, replace=True)
        assert halves.pids()["server"] == after != before
    said = installed.log.read_text()
    assert said.count("making a new one") == 0


def test_by_signal(installed: Installed, client: Client, halves: Halves, fd: int) -> None:
    client.register("a", fd)
    installed.name_it("second")
    os.kill(halves.pids()["keeper"], signal.SIGUSR2)
    wait_until(lambda: client.stats().notes == {"code": "second"})
    assert client.names() == ["a"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_new_code_hears_signals(
    installed: Installed, client: Client, number: signal.Signals
) -> None:
    client.upgrade()
    pids = Halves(client).pids()
    os.kill(pids["keeper"], number)
    for pid in pids.values():
        wait_until(lambda pid=pid: ended(pid), f"{pid} ends")
    assert not installed.path.exists()


def test_halves_of_the_new_code_die(
    installed: Installed, client: Client, halves: Halves, fd: int
) -> None:
    client.register("a", fd)
    installed.name_it("second")
    client.upgrade()
    for half in ("server", "keeper", "server", "keeper"):
        halves.kill(half)
        assert client.stats().notes == {"code": "second"}
    assert client.names() == ["a"]
    installed.name_it("third")
    client.upgrade()  # of a keeper that a server made
    assert client.stats().notes == {"code": "third"}
    assert client.names() == ["a"]


def test_leases_and_lifetimes_go_over(
    installed: Installed, client: Client, halves: Halves, fd: int
) -> None:
    near, far = socket.socketpair()
    client.register("a", fd)
    client.register("b", fd)
    client.register("hangs", near, drop_on_hangup=True)
    near.close()
    with Client(installed.path) as owner:
        owner.register("owned", fd, lifetime="connection")
        with Taker(str(installed.path), "a") as kept, Taker(str(installed.path), "b") as given:
            client.upgrade()
            assert client.names() == ["hangs", "owned"]
            assert client.stats().leases == 2
            kept.confirm()
            given.close()
            wait_until(lambda: client.names() == ["b", "hangs", "owned"])
    wait_until(lambda: client.names() == ["b", "hangs"])
    far.close()
    wait_until(lambda: client.names() == ["b"])


def test_a_waiting_client_goes_on_waiting(
    installed: Installed, client: Client, halves: Halves, fd: int
) -> None:
    found: list[tuple[int, int]] = []

    def wait() -> None:
        with Client(installed.path) as other, other.fetch_raw("late", timeout=20)[0] as it:
            found.append(identity(it))

    thread = threading.Thread(target=wait)
    thread.start()
    wait_until(lambda: client.stats().connections == 2)
    client.upgrade()
    client.register("late", fd)
    thread.join()
    assert found == [identity(fd)]


def test_an_old_server_that_does_not_end(
    installed: Installed, client: Client, halves: Halves, fd: int
) -> None:
    """It is stopped, and gets no more time than any other to make room."""
    client.register("a", fd)
    installed.name_it("second")
    pids = halves.pids()
    os.kill(pids["server"], signal.SIGSTOP)
    os.kill(pids["keeper"], signal.SIGUSR2)
    assert client.names() == ["a"]
    assert client.stats().notes == {"code": "second"}
    assert ended(pids["server"])


def test_a_reload_goes_over(folder: Path) -> None:
    """The server is stopped: it hears of the signal no more than of the new code."""
    policy = folder / "policy"
    policy.write_text("")
    with Manager(folder / "s", policy=policy) as manager:
        pids = Halves(manager).pids()
        policy.write_text('[[rule]]\neffect = "allow"\nverbs = ["fetch"]\n')
        os.kill(pids["server"], signal.SIGSTOP)
        os.kill(pids["keeper"], signal.SIGHUP)
        os.kill(pids["keeper"], signal.SIGUSR2)
        wait_until(lambda: manager.explain("fetch", "x", 12345, 12345).allowed)
        assert Halves(manager).pids()["keeper"] == pids["keeper"]


def test_the_owner_goes_over(folder: Path) -> None:
    """The control socket of a Manager is inherited, too."""
    with Manager(folder / "s") as manager:
        manager.upgrade()
        Halves(manager).fixed()
        pids = Halves(manager).pids()
    for pid in pids.values():
        assert ended(pid)
    assert not (folder / "s").exists()


def until_said(told: NotifySocket, line: str) -> list[list[str]]:
    """The lines of each notification up to the one that has *line*."""
    said: list[list[str]] = []
    while not said or line not in said[-1]:
        notification = told.receive()
        assert notification is not None
        notification.close()
        said.append(notification.lines)
    return said


def test_the_service_manager_is_told(installed: Installed, folder: Path) -> None:
    with NotifySocket(str(folder / "notify")) as told:
        installed.start(NOTIFY_SOCKET=told.address)
        with Client(installed.path) as client:
            client.upgrade()
            client.upgrade()
            client.shutdown()
        wait_until(lambda: not installed.path.exists())
        said = until_said(told, "STOPPING=1")
        assert not any("MAINPID" in line for lines in said[1:] for line in lines)


# Bad code.


def upgrade_fails(client: Client, halves: Halves, reason: str) -> None:
    """It says why, and all is as it was."""
    before = halves.pids()
    with pytest.raises(FdshareError, match=reason):
        client.upgrade()
    assert client.names() == ["a"]
    assert re.search(reason, client.stats().notes["upgrade"])
    assert halves.pids()["server"] == before["server"]
    halves.redundant()
    client.fetch_raw("a")[0].close()


KEEPER = "server/failover/keeper.py"
NEW_CODE = "server/failover/new_code.py"
UPGRADE = "server/failover/upgrade.py"
FUTURE = "from __future__ import annotations\n"


@pytest.mark.parametrize(
    ("file", "old", "new", "reason"),
    [
        (KEEPER, FUTURE, "def f(:\n", "SyntaxError"),
        (
            "server/loop/server.py",
            FUTURE,
            f"{FUTURE}import nothing_of_this_name\n",
            "nothing_of_this",
        ),
        (
            UPGRADE,
            r"HANDOVER_VERSION: Final = \d+",
            "HANDOVER_VERSION: Final = 99",
            "99",
        ),
        (
            UPGRADE,
            "    version: int\n",
            "    version: int\n    new: str\n",
            "new",
        ),
        ("server/core/table.py", r"def apply\(", "def applies(", "apply"),
        (UPGRADE, FUTURE, f"{FUTURE}import os; os._exit(7)\n", "status 7"),
        (
            UPGRADE,
            FUTURE,
            f"{FUTURE}import os; os.kill(os.getpid(), 9)\n",
            "-9",
        ),
    ],
)
def test_code_that_fails_its_trial(
    installed: Installed,
    client: Client,
    halves: Halves,
    fd: int,
    file: str,
    old: str,
    new: str,
    reason: str,
) -> None:
    client.register("a", fd)
    keeper = halves.pids()["keeper"]
    installed.change(file, old, new)
    upgrade_fails(client, halves, reason)
    assert halves.pids()["keeper"] == keeper
    wait_until(lambda: "the old code goes on" in installed.log.read_text())


def test_code_that_hangs_in_its_trial(
    installed: Installed, short_trial: None, client: Client, halves: Halves, fd: int
) -> None:
    client.register("a", fd)
    installed.begin(UPGRADE, HANGS)
    upgrade_fails(client, halves, "said nothing for 3 s")


def test_code_that_dies_after_the_exec(
    installed: Installed, client: Client, halves: Halves, fd: int
) -> None:
    client.register("a", fd)
    keeper = halves.pids()["keeper"]
    installed.change(
        NEW_CODE,
        r"def resume\(fd: int\) -> int:\n",
        "def resume(fd: int) -> int:\n    1/0\n",
    )
    upgrade_fails(client, halves, "died at its start")
    assert halves.pids()["keeper"] != keeper
    for half in ("server", "keeper"):
        halves.kill(half)
    assert client.names() == ["a"]


def test_code_that_hangs_after_the_exec(
    installed: Installed, short_silence: None, client: Client, halves: Halves, fd: int
) -> None:
    client.register("a", fd)
    hangs = "def resume(fd: int) -> int:\n    import select; select.select([], [], [])\n"
    installed.change(NEW_CODE, r"def resume\(fd: int\) -> int:\n", hangs)
    upgrade_fails(client, halves, "started and then hung")


def test_an_interpreter_that_is_gone(folder: Path) -> None:
    installed = Installed(folder)
    # A symbolic link would find no standard library; the virtual environment goes with it.
    python = folder / "python"
    python.symlink_to(sys.executable)
    installed.change(
        "server/interpreter.py", r"return \[sys.executable,", f"return [{str(python)!r},"
    )
    fd = os.memfd_create("x")
    try:
        installed.start()
        with Client(installed.path) as client:
            halves = Halves(client)
            client.register("a", fd)
            python.unlink()
            upgrade_fails(client, halves, "No such file")
            check_census(halves)
    finally:
        installed.end()
        os.close(fd)


def test_good_code_after_bad(installed: Installed, client: Client, halves: Halves, fd: int) -> None:
    client.register("a", fd)
    installed.begin(UPGRADE, "1/0")
    upgrade_fails(client, halves, "ZeroDivisionError")
    installed.change(UPGRADE, "1/0\n", "")
    installed.name_it("third")
    client.upgrade()
    assert client.stats().notes == {"code": "third"}


# At a bad moment.


def trial_runs(halves: Halves) -> int:
    """The pid of the process that tries the new code."""
    keeper = halves.pids()["keeper"]

    def find() -> int:
        with open(f"/proc/{keeper}/task/{keeper}/children") as file:
            children = [int(word) for word in file.read().split()]
        for pid in children:
            try:
                with open(f"/proc/{pid}/cmdline") as file:
                    if "try_table" in file.read():
                        return pid
            except OSError:
                continue
        return 0

    return wait_until(find, "the trial")


def test_it_ends_in_the_middle_of_a_trial(installed: Installed, client: Client) -> None:
    installed.begin(UPGRADE, HANGS)
    halves = Halves(client)
    os.kill(halves.pids()["keeper"], signal.SIGUSR2)
    trial = trial_runs(halves)
    client.shutdown()
    wait_until(lambda: not installed.path.exists())
    wait_until(lambda: ended(trial), "the trial ends, too")


def test_it_ends_although_the_trial_succeeds(installed: Installed, folder: Path) -> None:
    """New code that takes over while the service ends would begin it anew."""
    os.mkfifo(folder / "proceed")
    with NotifySocket(str(folder / "notify")) as told:
        installed.start(NOTIFY_SOCKET=told.address)
        installed.begin(UPGRADE, f"open({str(folder / 'proceed')!r}).read()")
        with Client(installed.path) as client:
            halves = Halves(client)
            pids = halves.pids()
            os.kill(pids["keeper"], signal.SIGUSR2)
            trial = trial_runs(halves)
        os.kill(pids["server"], signal.SIGSTOP)  # so the keeper waits for it, and for the trial
        os.kill(pids["keeper"], signal.SIGTERM)
        until_said(told, "STOPPING=1")

    def proceeds() -> bool:
        try:
            os.close(os.open(folder / "proceed", os.O_WRONLY | os.O_NONBLOCK))
        except OSError:  # ENXIO: nobody reads it yet
            return ended(trial)
        return True

    wait_until(proceeds, "the trial reads on, or its time is over")
    wait_until(lambda: state(trial) == "X", "the keeper knows how the trial went")
    with suppress(ProcessLookupError):  # the keeper ends it after a while
        os.kill(pids["server"], signal.SIGCONT)
    for pid in pids.values():
        wait_until(lambda pid=pid: ended(pid), f"{pid} ends")
    assert not installed.path.exists()


@pytest.mark.parametrize("half", ["server", "keeper"])
def test_a_half_dies_in_the_middle_of_a_trial(
    installed: Installed, short_trial: None, client: Client, halves: Halves, fd: int, half: str
) -> None:
    client.register("a", fd)
    installed.begin(UPGRADE, HANGS)
    failed: list[str] = []

    def upgrade() -> None:
        with Client(installed.path) as other:
            try:
                other.upgrade()
            except FdshareError as error:
                failed.append(str(error))

    thread = threading.Thread(target=upgrade)
    thread.start()
    trial = trial_runs(halves)
    kill(halves.pids()[half])  # type: ignore[index]
    thread.join()
    assert len(failed) == 1
    # A keeper may have died of the upgrade: the next one is not asked for it.
    reason = "the keeper died meanwhile" if half == "keeper" else "said nothing"
    assert reason in failed[0]
    assert client.names() == ["a"]
    if half == "keeper":  # nobody is left to end its trial
        os.kill(trial, signal.SIGKILL)


def test_changes_in_the_middle_of_a_trial(
    installed: Installed, client: Client, halves: Halves, fd: int
) -> None:
    """The table that is handed over is that of the exec, not that of the trial."""
    installed.begin(UPGRADE, "import select; select.select([], [], [], 1.0)")
    installed.name_it("second")
    os.kill(halves.pids()["keeper"], signal.SIGUSR2)
    count = 0
    while client.stats().notes != {"code": "second"}:
        client.register(f"n{count % 1000}", fd, replace=True)
        count += 1
    assert client.stats().generation == count > 0
    assert len(client.names()) == min(count, 1000)


def test_without_a_keeper_it_is_refused(folder: Path) -> None:
    with Manager(folder / "s", keeper=False) as manager, pytest.raises(InvalidArgument):
        manager.upgrade()
