"""Pipeline: the requests of all tasks on one connection, the answers routed by their ids.

One task, `run`, owns the connection. It connects when there is a request, and reads all the time: a
server stops serving a connection that has too many unread descriptors. When the connection ends, it
connects again and repeats the requests without an answer, under the same ids. The tasks that make
requests only write, and wait.

A caller that is cancelled returns at once. A request that was not sent yet is never sent, because
its descriptors may be closed by then. One that was sent is answered, and the descriptors of the
answer are closed here; so a take is undone, because nobody confirms it.
"""

from __future__ import annotations

import copy
import math
import socket
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from threading import get_ident
from typing import Final

import anyio

from fdshare.client.asynchronous.pending import Pending, PendingRequest, Subscription, catch_up
from fdshare.client.asynchronous.transport import Transport
from fdshare.client.conversation import Answer, Conversation, Exchange, WholeAnswer
from fdshare.client.settings import Dialer, Search
from fdshare.client.watch_state import WatchState
from fdshare.errors import (
    ClosedDescriptor,
    FdshareError,
    InvalidArgument,
    NoServer,
    ServerGone,
    ServerTimeout,
)
from fdshare.kernel.ancillary import discard_all
from fdshare.protocol import messages as m
from fdshare.protocol.subscriptions import Subscriptions

__all__ = ["Pipeline"]

# The server remembers as many answers (ANSWERS_KEPT in server/core/table.py): with more changes
# unanswered, one of them could not be repeated safely.
_MOST_CHANGES: Final = 64
_CHANGES: Final = frozenset((m.Register, m.Unregister, m.Rename))
_WAITS: Final = frozenset((m.Fetch, m.Take, m.Wait, m.Follow))
_FIRST_PAUSE: Final = 0.005  # seconds between attempts to reconnect, doubled each time ...
_LONGEST_PAUSE: Final = 0.2  # ... up to this


def _runner() -> object:
    """What runs this task: the event loop of asyncio, or else the thread, which has one of trio."""
    asyncio = sys.modules.get("asyncio")
    return (asyncio and asyncio._get_running_loop()) or get_ident()


class Pipeline:
    """The connection of one asynchronous client, and every request that waits on it."""

    def __init__(
        self,
        dialer: Dialer,
        authkey: bytes | None,
        timeout: float | None,
        reconnect: float,
    ) -> None:
        self._dialer = dialer
        self._authkey = authkey
        self._timeout = timeout
        self._reconnect = reconnect
        self._conversation = Conversation(authkey)
        self._pending: dict[int, Pending] = {}
        self._watchers: Subscriptions[Subscription] = Subscriptions()
        # Whose owner was dropped without closing it, perhaps in another thread.
        self.dropped: deque[Subscription] = deque()
        self._transport: Transport | None = None
        self._open = True
        self._work = anyio.Event()
        self._changes = anyio.Semaphore(_MOST_CHANGES)
        self._scope = anyio.CancelScope()
        self._home = _runner()

    # For the tasks that make requests.

    async def exchange(self, exchange: Exchange) -> WholeAnswer:
        """The whole answer. Raises: the refusal, ServerTimeout, ServerGone, NoServer."""
        return (await self.ask(exchange))[0]

    async def ask(
        self, exchange: Exchange, *, search: bool = True
    ) -> tuple[WholeAnswer, m.Welcome | None]:
        """The whole answer, and the server that gave it. Without *search* a server that is lost is
        not looked for. Raises: as `exchange`."""
        self._check_home()
        self._unsubscribe_dropped()
        delay = exchange.deadline(0.0, self._timeout)
        began = time.monotonic()
        due = math.inf if delay is None else anyio.current_time() + delay
        if type(exchange.request) not in _CHANGES or await self._may_change(due):
            call = await self._answered(exchange, self._reconnect if search else 0.0, due)
            if call is not None:
                return call.parts.finish(), call.server
        if self._transport is not None and self._transport.heard_at < began:
            # Nobody may ever answer on it, nor close it: a server that was killed can hang in its
            # end. What others ask for, and the watches, are sent again on another one.
            self._transport.hang_up()
        raise ServerTimeout(self._dialer.address, delay or 0.0)

    def reaches(self, server: m.Welcome | None) -> bool:
        """Whether there is a connection to *server*, as far as was noticed."""
        welcome = self._conversation.welcome
        if self._transport is None or welcome is None or server is None:
            return False
        return (welcome.pid, welcome.epoch) == (server.pid, server.epoch)

    async def _may_change(self, due: float) -> bool:
        """Waits until one more change may be under way, which `_end` counts off; False when it is
        *due*."""
        with anyio.CancelScope(deadline=due) as scope:
            await self._changes.acquire()
            if not self._open:
                self._changes.release()  # for the next one, to notice it as well
        return not scope.cancelled_caught

    async def _answered(
        self, exchange: Exchange, reconnect: float, due: float
    ) -> PendingRequest | None:
        """The request with its answer; None where there is none when it is *due*."""
        call = PendingRequest(self._new_id(), exchange, Search(reconnect))
        self._pending[call.id] = call
        try:
            self._send(call)
            with anyio.CancelScope(deadline=due):
                await call.done.wait()
            if not call.done.is_set():
                await catch_up()
        except BaseException:
            self._abandon(call)
            raise
        if not call.done.is_set():
            self._abandon(call)
            return None
        if call.error is not None:
            raise call.error
        return call

    def subscribe(self, state: WatchState) -> Subscription:
        """*state* is fed from now on, with a snapshot first. Raises: InvalidArgument."""
        self._check_home()
        self._unsubscribe_dropped()
        subscription = Subscription(self._new_id(), state, Search(self._reconnect))
        state.lost()
        self._pending[subscription.id] = subscription
        self._watchers.add(state.pattern, subscription)
        try:
            self._send(subscription)
        except BaseException:
            self._abandon(subscription)
            raise
        return subscription

    def unsubscribe(self, subscription: Subscription) -> None:
        """Ends it, at the server too."""
        if self._pending.get(subscription.id) is subscription and not subscription.abandoned:
            self._abandon(subscription)

    def _unsubscribe_dropped(self) -> None:
        while self.dropped:
            self.unsubscribe(self.dropped.popleft())

    def close(self) -> None:
        """Ends `run`; every task that waits gets ClosedDescriptor."""
        is_closed = getattr(self._home, "is_closed", None)
        if is_closed is not None and is_closed():  # none of them runs any more
            self.drop()
            return
        self._open = False
        self._scope.cancel()
        self._fail_all(ClosedDescriptor("the client is closed"))

    def drop(self) -> None:
        """Where no task of its event loop runs, as in a forked child: closes the connection, and
        nothing else."""
        self._open = False
        if self._transport is not None:
            self._transport.sock.close()

    def _check_home(self) -> None:
        """Raises: InvalidArgument: nothing here would ever wake this task."""
        if _runner() != self._home:
            raise InvalidArgument(
                "client", "it was entered in another event loop; make another one"
            )

    def _new_id(self) -> int:
        if not self._open:
            raise ClosedDescriptor("the client is closed")
        id = self._conversation.next_id()
        while id in self._pending:  # ids begin again after 2**32
            id = self._conversation.next_id()
        return id

    def _send(self, pending: Pending) -> None:
        """Sends it now, or leaves it to `run` until there is a connection."""
        exchange = pending.exchange
        # Encoded in the task that asks: what cannot be is an error of its own, and nobody else's.
        frame = self._conversation.frame(pending.id, exchange.request, len(exchange.fds))
        transport = self._transport
        if transport is None:
            self._work.set()
            return
        transport.queue(frame, exchange.fds, pending)
        transport.flush()

    def _abandon(self, pending: Pending) -> None:
        """Drops a request that no task waits for any more."""
        pending.abandoned = True
        if isinstance(pending, PendingRequest):
            pending.discard()
        if self._pending.get(pending.id) is not pending:
            return
        if not pending.sent or self._transport is None:
            self._end(pending)
        elif type(pending.exchange.request) in _WAITS or isinstance(pending, Subscription):
            cancel = self._conversation.frame(self._conversation.next_id(), m.Cancel(pending.id), 0)
            self._transport.queue(cancel)
            self._transport.flush()

    def _end(self, pending: Pending) -> None:
        """Forgets a request after its last answer."""
        del self._pending[pending.id]
        if isinstance(pending, Subscription):
            self._watchers.remove(pending.state.pattern, pending)
        elif type(pending.exchange.request) in _CHANGES:
            self._changes.release()

    def fail(self, pending: Pending, error: BaseException) -> None:
        """Ends a request with *error*: there will be no answer."""
        if self._pending.get(pending.id) is pending:
            self._end(pending)
            pending.fail(error)

    def _fail_all(self, error: BaseException) -> None:
        for pending in list(self._pending.values()):
            # Each task raises an exception of its own, because raising adds a traceback to it.
            self.fail(pending, copy.copy(error))

    # The task that owns the connection.

    async def run(self) -> None:
        """Has a connection while any request waits; until `close`."""
        try:
            with self._scope:
                pause = 0.0
                while True:
                    if not self._pending:
                        self._work = anyio.Event()
                        await self._work.wait()
                    began = time.monotonic()
                    await self._connection()
                    brief = time.monotonic() < began + _LONGEST_PAUSE
                    if self._pending and brief:  # perhaps it dies of our request: do not spin
                        await anyio.sleep(pause)
                        pause = min(pause * 2, _LONGEST_PAUSE) or _FIRST_PAUSE
                    else:
                        pause = 0.0
        finally:
            self.close()

    async def _connection(self) -> None:
        """One connection from its beginning to its end, or an attempt at one."""
        pause = _FIRST_PAUSE
        try:
            while (sock := self._dial()) is None:
                await anyio.sleep(pause)
                pause = min(pause * 2, _LONGEST_PAUSE)
                if not self._pending:
                    return
        except (FdshareError, OSError) as error:
            self._fail_all(error)
            return
        try:
            end = await self._converse(Transport(sock, self.fail))
        finally:
            self._transport = None
            sock.close()
            if self._conversation.welcome is not None:
                for pending in self._pending.values():
                    pending.search.answered()
            self._conversation.hello()  # drops what was half received
        if isinstance(end, FdshareError):
            self._fail_all(end)
        else:
            self._missed(end)

    def _dial(self) -> socket.socket | None:
        """A connection, or None to try again later."""
        try:
            return self._dialer.dial(0.0)
        except ServerTimeout:  # its backlog is full
            return None
        except NoServer as error:
            if not self._dialer.reached:
                raise
            self._missed(error.reason)
            return None

    def _missed(self, reason: str) -> None:
        """The connection ended, or cannot be made: what waits, waits for the next one."""
        for pending in list(self._pending.values()):
            pending.sent = False
            pending.lost()
            if pending.abandoned:
                self._end(pending)
            elif pending.search.missed():
                self.fail(pending, ServerGone(self._dialer.address, reason))

    async def _converse(self, transport: Transport) -> FdshareError | str:
        """Exchanges frames until the connection ends.

        Returns the error for every task that waits, or the reason why it ended.
        """
        transport.queue(self._conversation.hello())
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(transport.write)
            if self._timeout is not None:
                tasks.start_soon(self._look_after, transport, self._timeout)
            try:
                if self._authkey is not None:
                    with anyio.fail_after(self._timeout):
                        await self._authenticate(transport)
                return await self._read(transport)
            except FdshareError as error:
                return error
            except TimeoutError:
                return ServerTimeout(self._dialer.address, self._timeout or 0.0)
            except OSError as error:
                return str(error)
            finally:
                tasks.cancel_scope.cancel()
        raise AssertionError  # for mypy: the task group swallows nothing

    async def _read(self, transport: Transport) -> str:
        self._transport = transport
        for pending in list(self._pending.values()):
            pending.search.found()
            self._send(pending)
        while (answers := await transport.read(self._conversation)) is not None:
            self._dispatch(answers)
        return "it closed the connection"

    async def _look_after(self, transport: Transport, timeout: float) -> None:
        """Asks a server that has said nothing for long to what may wait longer, a watch or a
        request that waits for a name, whether it is there: see `ask`. Until cancelled."""
        while True:
            silent = time.monotonic() - transport.heard_at
            await anyio.sleep(timeout - silent if silent < timeout else timeout)
            patient = any(
                isinstance(pending, Subscription) or pending.exchange.wait != 0
                for pending in self._pending.values()
            )
            if patient and transport.heard_at < time.monotonic() - timeout:
                with suppress(FdshareError):
                    await self.exchange(Exchange(m.Ping()))

    async def _authenticate(self, transport: Transport) -> None:
        transport.flush()
        while self._conversation.welcome is None:
            self._dispatch(await self._must_read(transport))
        transport.queue(self._conversation.proof())
        transport.flush()
        while not (answers := await self._must_read(transport)):
            pass
        self._conversation.check_proof(answers[0])
        self._dispatch(answers[1:])

    async def _must_read(self, transport: Transport) -> list[Answer]:
        answers = await transport.read(self._conversation)
        if answers is None:
            raise ConnectionResetError("it closed the connection")
        return answers

    def _dispatch(self, answers: Sequence[Answer]) -> None:
        """Gives each answer to its request. Raises: why the server closes the connection."""
        self._unsubscribe_dropped()
        reason: FdshareError | None = None
        for answer in answers:
            reply = answer.reply
            if type(reply) is m.Event:
                discard_all(answer.descriptors)
                self._publish(reply)
            elif answer.id:
                pending = self._pending.get(answer.id)
                if pending is None:
                    discard_all(answer.descriptors)
                    continue
                if isinstance(pending, PendingRequest):
                    pending.server = self._conversation.welcome
                if pending.answer(answer):
                    self._end(pending)
            else:
                discard_all(answer.descriptors)
                if type(reply) is m.Overflowed:
                    self._overflowed()
                elif type(reply) is m.Refused:
                    reason = m.refusal_error(reply)
        if reason is not None:
            raise reason

    def _publish(self, event: m.Event) -> None:
        names = (event.name, event.old) if event.old else (event.name,)
        for subscription in self._watchers.of(*names):
            subscription.event(event)

    def _overflowed(self) -> None:
        for pending in self._pending.values():
            if isinstance(pending, Subscription):
                pending.state.overflowed()
