"""settings: what a client is as a pickle, whom it believes, how long it looks for a server."""

from __future__ import annotations

import multiprocessing.context
import os
import pickle
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from fdshare.client.settings import BaseClient, Dialer, Lifeline, Search
from fdshare.errors import ClosedDescriptor, InvalidArgument, NoServer, UntrustedServer
from fdshare.kernel.endpoint import listen
from fdshare.kernel.plain_socket import stream_pair


def test_it_travels_as_its_settings() -> None:
    client = BaseClient("/path", timeout=3.0, reconnect=1.0, trust=[7])
    arrived = pickle.loads(pickle.dumps(client))
    assert arrived.__getstate__() == client.__getstate__()
    assert (arrived.address, arrived.timeout, arrived.reconnect) == ("/path", 3.0, 1.0)
    assert repr(arrived) == "<BaseClient of /path>"
    assert arrived


def test_an_authkey_travels_to_a_child_alone() -> None:
    """A pickle may lie about for anybody to read; what a child is spawned with does not."""
    client = BaseClient("/path", authkey=b"secret")
    with pytest.raises(InvalidArgument, match="authkey"):
        pickle.dumps(client)
    multiprocessing.context.set_spawning_popen(object())  # type: ignore[arg-type]
    try:
        arrived = pickle.loads(pickle.dumps(client))
    finally:
        multiprocessing.context.set_spawning_popen(None)
    assert arrived._authkey == b"secret"


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"timeout": "5"}, "timeout: '5' is not a number of seconds"),
        ({"timeout": True}, "timeout: True is not a number of seconds"),
        ({"reconnect": None}, "reconnect: None is not a number of seconds"),
        ({"trust": 1000}, "trust: 1000 is no list of uids; write [1000]"),
    ],
)
def test_what_is_no_setting_is_told_at_once(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        BaseClient("/nowhere", **wrong)
    assert str(caught.value) == says


def test_root_and_oneself_are_believed() -> None:
    assert BaseClient("/path").__getstate__()["trust"] == {0, os.geteuid()}


def test_a_dialer_trusts_whom_it_is_told(folder: Path) -> None:
    me = os.geteuid()
    with listen(folder / "s") as listener:
        doubting = Dialer(listener.address, [me + 1])
        with pytest.raises(UntrustedServer) as caught:
            doubting.dial(None)
        assert caught.value.uid == me
        trusting = Dialer(listener.address, [me])
        trusting.dial(None).close()
    with pytest.raises(NoServer):
        trusting.dial(None)
    assert (doubting.reached, trusting.reached) == (False, True)


# How long a server is looked for.


def test_it_is_looked_for_from_the_first_miss_on() -> None:
    search = Search(1000.0)
    assert not search.missed()
    assert not search.missed()
    assert Search(0.0).missed()


def test_a_word_from_the_server_begins_the_search_anew() -> None:
    search = Search(0.0)
    assert search.missed()
    search.seconds = 1000.0
    assert search.missed()  # the time that it had is over
    search.answered()
    assert not search.missed()


def test_a_connection_alone_does_not() -> None:
    """A server may die of what it is asked, again and again."""
    search = Search(0.0)
    assert search.missed()
    search.seconds = 1000.0
    search.found()
    assert search.missed()


# The lifeline.


def test_the_end_of_a_lifeline_is_seen_at_the_other_end() -> None:
    lifeline = Lifeline()
    with socket.socket(fileno=os.dup(lifeline.end())) as given:
        assert lifeline.end() == lifeline.end()
        given.setblocking(False)
        with pytest.raises(BlockingIOError):
            given.recv(1)
        lifeline.close()
        assert given.recv(1) == b""
    lifeline.close()
    with pytest.raises(ClosedDescriptor):
        lifeline.end()


@pytest.mark.parametrize("event", ["call", "return"])
def test_a_signal_handler_may_close_it_while_it_is_made(event: str) -> None:
    """Its thread waited for itself, for ever; and nothing was there to be closed."""

    def at(frame: FrameType, what: str, _: object) -> Callable[..., Any]:
        if frame.f_code is stream_pair.__code__ and what == event:
            sys.settrace(None)
            signal.raise_signal(signal.SIGUSR1)
        return at

    lifeline, traced = Lifeline(), sys.gettrace()
    before = signal.signal(signal.SIGUSR1, lambda *_: lifeline.close())
    sys.settrace(at)
    try:
        with pytest.raises(ClosedDescriptor):
            lifeline.end()
    finally:
        sys.settrace(traced)
        signal.signal(signal.SIGUSR1, before)
    assert lifeline._ends is None


def test_a_forked_child_holds_no_end_of_it() -> None:
    lifeline = Lifeline()
    with socket.socket(fileno=os.dup(lifeline.end())) as given:
        gone, go = os.pipe()
        pid = os.fork()
        if not pid:
            os.close(go)
            os.read(gone, 1)  # the end of the test
            lifeline.end()  # one of its own
            os._exit(0)
        lifeline.close()
        given.settimeout(20)
        assert given.recv(1) == b""
        os.close(gone)
        os.close(go)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
