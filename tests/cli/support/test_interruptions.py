"""Interruptions: signals as something to poll."""

from __future__ import annotations

import os
import select
import signal

from fdshare.cli.support.interruptions import Interruptions


def test_signals_are_read_in_their_order() -> None:
    former = signal.getsignal(signal.SIGTERM)
    with Interruptions() as interruptions:
        assert interruptions.received() is None
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert select.select([interruptions], [], [], 30)[0] == [interruptions]
        assert interruptions.received() == signal.SIGTERM
        assert interruptions.received() == signal.SIGINT
    assert signal.getsignal(signal.SIGTERM) is former


def test_what_is_ignored_stays_ignored() -> None:
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interruptions() as interruptions:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)
            assert interruptions.received() == signal.SIGTERM
            assert interruptions.received() is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, former)
