"""Conversation: the client's half of the protocol without the waiting. Bytes in, answers out.

Both clients use it: the blocking one has one for each connection of its pool, the asynchronous one
has one for all its requests.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from typing import Any, Final, NamedTuple, TypeAlias

import msgspec

from fdshare.errors import (
    AuthenticationFailed,
    FdshareError,
    InvalidArgument,
    InvalidName,
    ProtocolError,
    VersionMismatch,
)
from fdshare.kernel.ancillary import discard_all
from fdshare.kernel.descriptor import Descriptor
from fdshare.protocol import messages as m
from fdshare.protocol.auth import NONCE_SIZE, prove
from fdshare.protocol.framing import HEADER, MAX_REQUEST, Receiver, only_frame

__all__ = [
    "LEASE_END",
    "Answer",
    "Conversation",
    "Exchange",
    "LeaseEnd",
    "Read",
    "WholeAnswer",
    "check_seconds",
]

# Seconds that the server gets to close what was taken; what hangs in close(2) it does not wait for.
LEASE_END: Final = 1.0


def check_seconds(argument: str, seconds: object) -> None:
    """Raises: InvalidArgument: it is no number."""
    if type(seconds) is bool or not isinstance(seconds, int | float) or seconds != seconds:
        raise InvalidArgument(argument, f"{seconds!r} is not a number of seconds")


# Exchange and WholeAnswer are Structs and not dataclasses: C makes them, in a tenth of the time.


class Exchange(msgspec.Struct):
    """A request to be made: *fds* are borrowed until it is answered. *wait* is how many seconds
    more than usual the answer may take, None for ever. *id* is 0 until it is first sent."""

    request: m.Request
    fds: Sequence[int] = ()
    wait: float | None = 0.0
    id: int = 0

    def deadline(self, started: float, timeout: float | None) -> float | None:
        """When the answer must have come, if the server may take *timeout* seconds.

        None is never. Raises: InvalidArgument.
        """
        if self.wait is not None:
            check_seconds("timeout", self.wait)
        if timeout is None or self.wait is None:
            return None
        return started + timeout + self.wait

    def shorten(self, started: float) -> None:
        """Before a repeat: reduces the wait, which began at *started*, to what is left of it."""
        if self.wait:
            left = max(started + self.wait - time.monotonic(), 0.001)
            self.request = msgspec.structs.replace(self.request, wait=left)


class LeaseEnd(msgspec.Struct):
    """Not a request: the end of the lease on *sock*, to be waited for, but no longer than LEASE_END
    seconds. It comes when the server, and its keeper, have closed what was taken. *sock* is
    borrowed."""

    sock: socket.socket

    def wait(self) -> None:
        """Waits for it."""
        self.sock.settimeout(LEASE_END)
        try:
            self.sock.recv(1)
        except OSError:
            pass  # in time, or not: the entry is taken


# What one recvmsg(2) brought: bytes, descriptors, and why some of these are missing.
Read: TypeAlias = tuple[memoryview, list[Descriptor], FdshareError | None]


class Answer(NamedTuple):
    """One frame for a request; who gets it owns the descriptors."""

    id: int
    reply: m.AnyReply
    descriptors: list[Descriptor]
    lost: FdshareError | None


class WholeAnswer(msgspec.Struct):
    """The whole answer to one request, its parts in order."""

    replies: list[Any] = msgspec.field(default_factory=list)
    descriptors: list[Descriptor] = msgspec.field(default_factory=list)
    lost: FdshareError | None = None

    def add(self, answer: Answer) -> bool:
        """Takes one part over; True if it was the last."""
        self.replies.append(answer.reply)
        self.descriptors += answer.descriptors
        self.lost = self.lost or answer.lost
        return not getattr(answer.reply, "more", False)

    def finish(self) -> WholeAnswer:
        """Itself. Raises the refusal, or why descriptors are missing; then all are closed."""
        reply = self.replies[-1]
        failure = m.refusal_error(reply) if type(reply) is m.Refused else self.lost
        if failure is not None:
            discard_all(self.descriptors)
            raise failure
        return self


class Conversation:
    """One connection id and the requests made under it; outlives the connections themselves."""

    def __init__(self, authkey: bytes | None = None) -> None:
        self.session: Final = os.urandom(8).hex()
        self.welcome: m.Welcome | None = None
        self.welcomes = 0  # how many connections were answered
        self._authkey = authkey
        self._nonce = b""
        self._server_nonce = b""
        self._last_id = 0
        self._receiver: Receiver[Descriptor] = Receiver()

    def next_id(self) -> int:
        """An id for a new request; a repeated one keeps its own."""
        self._last_id = self._last_id % 0xFFFFFFFF + 1
        return self._last_id

    def hello(self) -> bytes:
        """The first frame of a new connection. Closes what was half received on the old one."""
        discard_all(self._receiver.drain())
        self._receiver = Receiver()
        self.welcome = None
        self._nonce = os.urandom(NONCE_SIZE) if self._authkey is not None else b""
        hello = m.Hello(m.MAGIC, m.VERSION, self.session, self._nonce)
        return self.frame(0, hello, 0)

    def frame(self, id: int, request: m.Request, count: int) -> bytes:
        """The frame of a request that has *count* descriptors.

        Raises: InvalidName, InvalidArgument: it is none that the server serves, or a message cannot
        carry it.
        """
        request.check()
        try:
            body = m.encode(request)
        except UnicodeEncodeError as error:
            raise InvalidName(ascii(error.object), "it cannot be encoded as UTF-8") from None
        except (TypeError, OverflowError) as error:
            raise InvalidArgument(type(request).__name__, str(error)) from None
        if len(body) > MAX_REQUEST:
            raise InvalidArgument(
                type(request).__name__, f"a message of {len(body)} bytes, at most {MAX_REQUEST}"
            )
        return HEADER.pack(len(body), count, m.VERSION, 0, id) + body

    def whole(
        self,
        data: memoryview,
        descriptors: list[Descriptor],
        lost: FdshareError | None,
        id: int,
    ) -> WholeAnswer | None:
        """The whole answer to request *id*, if *data* is that and nothing else, as nearly always.

        None in every other case: then nothing was taken over, and `feed` has to get it.
        """
        if lost is not None or not self._receiver.idle or only_frame(data, len(descriptors)) != id:
            return None
        try:
            reply = m.decode_reply(data[HEADER.size :].tobytes())
        except ProtocolError:
            return None
        if type(reply) is not m.Given and (
            type(reply) is m.Refused or getattr(reply, "more", False)
        ):
            return None
        return WholeAnswer([reply], descriptors)

    def feed(
        self, data: memoryview, descriptors: list[Descriptor], lost: FdshareError | None
    ) -> list[Answer]:
        """The answers and events in what was received. The Welcome is kept, not returned.

        Raises: ProtocolError, VersionMismatch: close the connection; all that came is closed.
        """
        receiver = self._receiver
        frames = receiver.feed(data, descriptors, lost)
        answers: list[Answer] = []
        try:
            for frame in frames:
                reply = m.decode_reply(frame.body)
                if type(reply) is m.Welcome:
                    discard_all(frame.descriptors)
                    self._check(reply)
                    continue
                answers.append(Answer(frame.id, reply, frame.descriptors, frame.lost))
            if receiver.failure is not None:
                raise receiver.failure
        except BaseException:
            for frame in frames:
                discard_all(frame.descriptors)
            discard_all(receiver.drain())
            raise
        return answers

    def _check(self, welcome: m.Welcome) -> None:
        if welcome.magic != m.MAGIC:
            raise ProtocolError("the first frame is not a Welcome")
        if welcome.version != m.VERSION:
            raise VersionMismatch(welcome.version, m.VERSION)
        self.welcome = welcome
        self.welcomes += 1

    # The authkey, where there is one: two more frames before the first request.

    def proof(self) -> bytes:
        """The frame that answers the Welcome. Raises: AuthenticationFailed: it has no nonce."""
        assert self._authkey is not None
        assert self.welcome is not None
        self._server_nonce = self.welcome.nonce
        if not self._server_nonce:
            raise AuthenticationFailed(
                "the server has no authkey, so it cannot prove that it has yours"
            )
        mac = prove(self._authkey, "client", self._nonce, self._server_nonce)
        return self.frame(0, m.Prove(mac), 0)

    def check_proof(self, answer: Answer) -> None:
        """Raises AuthenticationFailed unless *answer* is the server's proof."""
        assert self._authkey is not None
        if type(answer.reply) is m.Refused:
            raise m.refusal_error(answer.reply)
        expected = prove(self._authkey, "server", self._nonce, self._server_nonce)
        import hmac  # imported already, by checked_authkey

        if type(answer.reply) is not m.Proved or not hmac.compare_digest(
            answer.reply.mac, expected
        ):
            raise AuthenticationFailed("the server has another authkey")
