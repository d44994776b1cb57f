"""Results of pools: a wait for them notices signals."""

from __future__ import annotations

import os
import signal
import threading
from functools import partial

import pytest
from breaking import state
from conftest import wait_until

from fdshare import get_context
from mp import children
from mp.common import PACKAGES, trackers  # noqa: F401


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("way", ["apply", "starmap", "imap", "imap_unordered"])
def test_a_wait_notices_a_signal_that_another_thread_has_received(package: str, way: str) -> None:
    """As it notices one that came just before it: the handler ran when the job was done."""

    def interrupt(*_: object) -> None:
        raise Interrupted

    def receive() -> None:
        os.read(begun, 1)
        wait_until(lambda: state(os.getpid()) == "S")
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)

    former = signal.signal(signal.SIGUSR1, interrupt)
    (begun, says), (waits, tells) = os.pipe(), os.pipe()
    receiver = threading.Thread(target=receive)
    receiver.start()
    with get_context("fork", backend=package).Pool(1) as pool:
        with pytest.raises(Interrupted):
            if way == "apply":
                pool.apply(children.say_and_wait, (says, waits))
            elif way == "starmap":
                pool.starmap(children.say_and_wait, [(says, waits)] * 2)
            else:
                waiting = partial(children.say_and_wait, says)
                next(getattr(pool, way)(waiting, [waits] * 2))
        os.write(tells, b"ab")
    receiver.join()
    signal.signal(signal.SIGUSR1, former)
    for fd in (begun, says, waits, tells):
        os.close(fd)


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("way", ["imap", "imap_unordered"])
def test_results_one_after_the_other(package: str, way: str) -> None:
    with get_context("fork", backend=package).Pool(1) as pool:
        imap = getattr(pool, way)
        assert list(imap(abs, [])) == []
        assert list(imap(abs, range(-5, 0))) == [5, 4, 3, 2, 1]
        assert list(imap(abs, range(-5, 0), 2)) == [5, 4, 3, 2, 1]
        results = imap(len, ["a", 1, "bc"])
        assert results.next() == 1
        with pytest.raises(TypeError):
            next(results)
        assert results.next(30) == 2
        for timeout in (None, 1):
            with pytest.raises(StopIteration):
                results.next(timeout)
        with pytest.raises(ValueError, match="Chunksize must be 1"):
            imap(abs, [], 0)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_timeout_of_the_next_result(package: str) -> None:
    waits, tells = os.pipe()
    ctx = get_context("fork", backend=package)
    with ctx.Pool(1) as pool:
        results = pool.imap(partial(os.read, waits), [1])
        with pytest.raises(ctx.TimeoutError):
            results.next(0.01)
        os.write(tells, b"a")
        assert next(results) == b"a"
    os.close(waits)
    os.close(tells)
