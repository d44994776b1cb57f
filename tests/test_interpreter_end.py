"""What is left to the end of the interpreter, where modules lose their names before."""

from __future__ import annotations

import subprocess
import sys

import pytest

import fdshare

# Modules that something in C refers to are there until the end, and empty. Then goes what one of
# those that were imported first refers to.
PROGRAM = """
import codecs, os, sys
import fdshare
{make}
def keep(_, modules=list(sys.modules.values())):
    return None
codecs.register(keep)
codecs.left = left
del left, keep
"""
DESCRIPTOR = "from fdshare.kernel import Descriptor\nleft = Descriptor(os.dup(2))"
SPARE = "from fdshare.kernel.descriptor import Spare\nleft = Spare(os.dup(2))"
HELD = "with open(os.devnull) as file: left = fdshare.hold(file)"
FOLLOWED = """from fdshare.client.follow_state import FollowedObject
left = FollowedObject(open(os.devnull), 1)"""
PRIVATE_SERVER = """from multiprocessing.reduction import ForkingPickler
fdshare.install()
with open(os.devnull) as file: ForkingPickler.dumps(file)
from fdshare.mp.pickling import parked
left = list(parked._servers.values())"""
ARRIVAL = """from fdshare.kernel.descriptor import Spare
from fdshare.mp.pickling.parked import _Arrival
left = _Arrival(None, b"", {{0: [Spare(os.dup(2))]}})"""
CLIENT = "left = fdshare.connect({path!r})\nassert left.names() == []"
WATCH = "left = fdshare.connect({path!r}).watch()"


@pytest.mark.parametrize(
    "make", [DESCRIPTOR, SPARE, HELD, FOLLOWED, PRIVATE_SERVER, ARRIVAL, CLIENT, WATCH]
)
def test_nothing_is_said_at_the_end(make: str) -> None:
    with fdshare.Manager() as manager:
        program = PROGRAM.format(make=make.format(path=str(manager.address)))
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", program],
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    assert (done.returncode, done.stderr) == (0, "")
