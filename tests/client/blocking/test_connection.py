"""connection: the time of each request, and what is left where it does not end well."""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
from contextlib import suppress
from functools import partial

import pytest
from conftest import Watched, census
from mp.interrupts import Interrupt, Interrupter, handled_by, interrupt, make_interrupter  # noqa: F401

from fdshare.client.blocking.client import Client
from fdshare.errors import ServerTimeout


def test_who_gets_no_answer_stops_waiting(server: Watched) -> None:
    """Also on a connection whose last request had more time."""
    with Client(server.address, timeout=0.2) as client:
        client.register("there", 0)
        client.fetch_raw("there", timeout=500)[0].close()
        os.kill(server.pid, signal.SIGSTOP)
        try:
            with pytest.raises(ServerTimeout):
                client.info("there")
        finally:
            os.kill(server.pid, signal.SIGCONT)


@pytest.mark.usefixtures("signalled")
@pytest.mark.parametrize("direction", ["receive", "send"])
def test_signals_do_not_prolong_it(server: Watched, direction: str) -> None:
    with Client(server.address, timeout=0.2) as client:
        client.ping()
        (connection,) = client._idle
        assert connection._sock is not None
        if direction == "send":  # more than the socket takes
            connection._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        os.kill(server.pid, signal.SIGSTOP)
        try:
            with pytest.raises(ServerTimeout):
                client.fetch_many(f"{number:0250}" for number in range(250))
        finally:
            os.kill(server.pid, signal.SIGCONT)


@pytest.mark.usefixtures("no_sigpipe")
def test_a_fetch_made_before_goes_over_another_connection(server: Watched) -> None:
    with Client(server.address) as client:
        client.register("there", 0)
        client.fetch("there").close()
        (connection,) = client._idle
        assert connection._sock is not None
        connection._sock.shutdown(socket.SHUT_RDWR)
        client.fetch("there").close()
        assert connection.opened == 2


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # of the socket, which its finaliser closes
def test_the_next_request_is_answered_if_a_handler_raises_in_close(
    server: Watched, interrupter: Interrupter
) -> None:
    with Client(server.address) as client:
        client.register("there", 0)
        (connection,) = client._idle
        instructions, over = 1, False
        while not over:
            with handled_by(interrupt), suppress(Interrupt):
                over = not interrupter.arrives(instructions, connection.close)
            client.register("there", 0, replace=True)
            instructions += 1


@pytest.mark.parametrize("verb", ["fetch", "take", "bind"])
def test_what_came_is_closed_if_a_handler_raises(
    server: Watched, interrupter: Interrupter, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What finalisers warn of. That of pytest keeps the exception, and with it all that is to close.
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    with Client(server.address) as client:
        call = partial(getattr(client, verb), "a", *(["tcp://127.0.0.1:0"] * (verb == "bind")))

        def once() -> None:
            call().close()

        def again() -> None:
            with socket.socket() as sock:
                if verb == "bind":
                    sock.bind(("127.0.0.1", 0))
                    sock.listen()
                client.register("a", sock, replace=True)

        again()
        for _ in range(3):  # its connection, its modules, its cache
            once()
            again()
        before, instructions, over = census(), 1, False
        while not over:
            with handled_by(interrupt), suppress(Interrupt):
                over = not interrupter.arrives(instructions, once)
            again()
            client.fetch("a").close()
            gc.collect()
            assert len(census()) == len(before), instructions
            instructions += 13
