"""AsyncClient: the verbs for asyncio and trio, under the names that `Client` gives them.

Many tasks may use one client: their requests are pipelined on one connection (see pipeline.py). A
verb that is cancelled leaves nothing behind: what arrives for it later is closed, and a take is
undone. A change (register, unregister, rename) that is cancelled after it was sent happens once or
not at all: look, if you need to know.
"""

from __future__ import annotations

import os
import socket
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping
from types import TracebackType
from typing import Any, Self, TypeVar

import anyio
import anyio.lowlevel
from anyio.abc import TaskGroup

from fdshare.client import verbs
from fdshare.client.asynchronous import lease_end
from fdshare.client.asynchronous.follow import AsyncFollower
from fdshare.client.asynchronous.pipeline import Pipeline
from fdshare.client.asynchronous.watch import AsyncWatcher
from fdshare.client.conversation import LeaseEnd, WholeAnswer
from fdshare.client.mapped_page import MappedPage
from fdshare.client.settings import BaseClient, Lifeline
from fdshare.errors import ClosedDescriptor, FdshareError, InvalidArgument
from fdshare.kernel.at_fork import forget_after_fork
from fdshare.kernel.descriptor import Descriptor
from fdshare.protocol import messages as m

__all__ = ["AsyncClient", "connect"]

T = TypeVar("T")


class AsyncClient(BaseClient):
    """The verbs of one server, to be awaited by the tasks of one event loop, in its thread alone.

    It is entered with `async with`, once, and left in the task that entered it. It is for the tasks
    of that event loop: those of another one make a client of their own.

    *timeout*: seconds that the server may take to answer, None for ever; the timeout of a verb that
    waits for a name is added. If the server is lost during a call, the client looks for it during
    *reconnect* seconds and repeats the request under its number, so that it happens once.

    *trust*: the uids whose server is trusted; None for one's own and root.

    >>> async def register_and_fetch(path):
    ...     async with aio.connect(path) as client:
    ...         with open(os.devnull) as file:
    ...             await client.register("null", file)
    ...         with await client.fetch("null") as again:
    ...             return again.name
    >>> with fdshare.Manager() as manager:
    ...     asyncio.run(register_and_fetch(manager.address))
    '/dev/null'
    """

    _tasks: TaskGroup
    _pipeline: Pipeline

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        authkey: bytes | None = None,
        timeout: float | None = 30.0,
        reconnect: float = 2.0,
        trust: Collection[int] | None = None,
    ) -> None:
        super().__init__(path, authkey=authkey, timeout=timeout, reconnect=reconnect, trust=trust)
        self._closed = True  # until it is entered
        self._entered = False
        self._lifeline = Lifeline()
        self._page = MappedPage()
        self._followers: weakref.WeakSet[AsyncFollower] = weakref.WeakSet()
        forget_after_fork(self)

    # The verbs.

    async def register(
        self,
        name: str,
        obj: object,
        *,
        replace: bool = False,
        if_generation: int | None = None,
        lifetime: m.Lifetime = "server",
        ttl: float | None = None,
        grace: float = 0.0,
        drop_on_hangup: bool = False,
        metadata: Mapping[str, str] | None = None,
    ) -> m.Registered:
        """The entry that is now registered under *name*; see `Client.register`.

        It is safe to close *obj* after this call.
        """
        lifeline = self._lifeline.end() if lifetime == "connection" and not self._closed else None
        return await self._do(
            verbs.register(
                name,
                obj,
                replace=replace,
                if_generation=if_generation,
                lifetime=lifetime,
                ttl=ttl,
                grace=grace,
                drop_on_hangup=drop_on_hangup,
                metadata=metadata,
                lifeline=lifeline,
            )
        )

    async def fetch(self, name: str, *, timeout: float | None = 0) -> Any:
        """A new object of the kind that was registered under *name*; see `Client.fetch`.

        Waits up to *timeout* seconds for the name, None for ever. The caller owns the result.
        """
        return await self._do(verbs.fetch(name, timeout))

    async def fetch_raw(self, name: str, *, timeout: float | None = 0) -> list[Descriptor]:
        """The bare descriptors of *name*, whatever their kind. The caller owns the result."""
        return await self._do(verbs.fetch_raw(name, timeout))

    async def fetch_many(self, names: Iterable[str]) -> dict[str, Any]:
        """name -> object for all of *names*, or NameNotFound. The caller owns the results."""
        return await self._do(verbs.fetch_many(names))

    async def take(self, name: str, *, timeout: float | None = 0) -> Any:
        """As `fetch`, and the entry is removed once this has returned.

        If it is cancelled, the entry is back under its name. The caller owns the result.
        """
        return await self._do(verbs.take(name, timeout))

    async def take_raw(self, name: str, *, timeout: float | None = 0) -> list[Descriptor]:
        """As `take`, but the bare descriptors. The caller owns the result."""
        return await self._do(verbs.take_raw(name, timeout))

    async def wait(self, name: str, *, timeout: float | None = None) -> m.Registered:
        """The entry under *name*, as soon as there is one; no descriptor moves."""
        return await self._do(verbs.wait(name, timeout))

    def watch(self, pattern: str = "*", *, timeout: float | None = None) -> AsyncWatcher:
        """An asynchronous iterator over what changes: first a Snapshot, then each Event, in order.

        *timeout* bounds each wait, in seconds. See `AsyncWatcher`. The caller owns the result.

        >>> async with client.watch("n*") as watch:
        ...     first = await anext(watch)
        ...     _ = await client.register("null", file)
        ...     first.entries, (await anext(watch)).event
        ({}, 'registered')
        """
        return AsyncWatcher(self, self._open_pipeline, pattern, timeout)

    def follow(
        self,
        name: str,
        *,
        timeout: float | None = 0,
        on_change: Callable[[Any], object] | None = None,
    ) -> AsyncFollower:
        """A handle on what is registered under *name*, whose `current()` is the object of now.

        To be entered with `async with`, which asks for the object. See `Client.follow` and
        `AsyncFollower`. The caller owns the result.

        >>> _ = await client.register("null", file)
        >>> async with client.follow("null") as followed:
        ...     with open("/dev/zero") as other:
        ...         _ = await client.register("null", other, replace=True)
        ...     (await followed.current()).name
        '/dev/zero'
        """
        follower = AsyncFollower(self._open_pipeline, self._page, name, timeout, on_change)
        self._followers.add(follower)
        return follower

    async def unregister(self, name: str, *, if_generation: int | None = None) -> None:
        """Removes the entry; the server closes its descriptors.

        Raises: NameNotFound, GenerationMismatch, AccessDenied.
        """
        await self._do(verbs.unregister(name, if_generation))

    async def rename(self, old: str, new: str) -> m.Registered:
        """The entry under its new name, with a new generation; in one step."""
        return await self._do(verbs.rename(old, new))

    async def bind(
        self, name: str, address: str, *, backlog: int = 4096, reuse_port: bool = False
    ) -> socket.socket:
        """The socket under *name*; if there is none, the server binds *address* and registers it.

        See `Client.bind`. The caller owns the result.
        """
        return await self._do(verbs.bind(name, address, backlog, reuse_port))

    async def names(self, pattern: str = "*") -> list[str]:
        """The names that match the shell pattern, sorted; `*` crosses `/`."""
        return await self._do(verbs.names(pattern))

    async def info(self, name: str) -> m.EntryInfo:
        """What the server knows of *name*, and the kernel of its descriptors.

        Raises: NameNotFound.
        """
        return await self._do(verbs.info(name))

    async def infos(self, pattern: str = "*") -> list[m.EntryInfo]:
        """`info` of every entry whose name matches the shell pattern, in the order of names."""
        return await self._do(verbs.infos(pattern))

    async def explain(
        self, verb: str, name: str, uid: int, gid: int, groups: Iterable[int] = ()
    ) -> m.Explained:
        """Whether the policy allows *verb* on *name* to that user, and the rule that decides."""
        return await self._do(verbs.explain(verb, name, uid, gid, groups))

    async def stats(self) -> m.ServerStats:
        """The state of the server: pids, counts, limits."""
        return await self._do(verbs.stats())

    async def ping(self) -> None:
        """Returns when the server has answered."""
        await self._do(verbs.simple(m.Ping()))

    async def reload(self) -> None:
        """The server reads its policy file again. Raises: PolicyError; the old one stays."""
        await self._do(verbs.simple(m.Reload()))

    async def upgrade(self) -> None:
        """The server becomes the code that is installed now; see `Client.upgrade`."""
        await self._do(verbs.simple(m.Upgrade()))

    async def shutdown(self) -> None:
        """Ends the server; it closes all that it holds."""
        await self._do(verbs.simple(m.Shutdown()))

    # Its own life.

    async def close(self) -> None:
        """Closes the connection, which ends entries of lifetime "connection". Others stay.

        A call that waits in another task raises ClosedDescriptor. What `follow` gave is closed,
        too.
        """
        self._close()
        await anyio.lowlevel.checkpoint()

    aclose = close  # for contextlib.aclosing and its like

    def _close(self) -> None:
        if not self._closed:
            self._closed = True
            self._pipeline.close()
        for follower in list(self._followers):
            follower._close()
        self._page.close()
        self._lifeline.close()

    def _state(self) -> str:
        return super()._state() if self._entered else " not entered"

    async def __aenter__(self) -> Self:
        if self._entered:
            raise InvalidArgument("client", "it was entered before; make another one")
        self._entered = True
        self._pipeline = Pipeline(self._dialer, self._authkey, self.timeout, self.reconnect)
        self._tasks = anyio.create_task_group()
        await self._tasks.__aenter__()
        try:
            self._tasks.start_soon(self._pipeline.run)
            self._closed = False
            await self.ping()
        except BaseException as error:
            await self.__aexit__(type(error), error, error.__traceback__)
            raise
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        self._close()
        try:
            return await self._tasks.__aexit__(exc_type, exc, traceback)
        except BaseExceptionGroup as group:
            if len(group.exceptions) > 1:
                raise
            if group.exceptions[0] is exc:
                return False  # the caller's own, without the wrapping
            raise group.exceptions[0] from None

    # How a call is made.

    async def _do(self, steps: verbs.Steps[T]) -> T:
        try:
            pipeline = self._open_pipeline()
            exchange = next(steps)
            while True:
                if isinstance(exchange, LeaseEnd):
                    await lease_end.wait_for(exchange)
                    exchange = steps.send(WholeAnswer())
                    continue
                try:
                    parts = await pipeline.exchange(exchange)
                except FdshareError as error:
                    exchange = steps.throw(error)
                else:
                    exchange = steps.send(parts)
        except StopIteration as stop:
            result: T = stop.value
            return result
        except BaseException:
            steps.close()
            raise

    def _open_pipeline(self) -> Pipeline:
        if self._closed:
            raise ClosedDescriptor("the client is closed, or was not entered with `async with`")
        return self._pipeline

    def _after_fork(self) -> None:
        """In the child, which has no event loop: closes its copy of the parent's connection."""
        if not self._closed:
            self._closed = True
            self._pipeline.drop()


def connect(
    path: str | os.PathLike[str] | None = None,
    *,
    authkey: bytes | None = None,
    timeout: float | None = 30.0,
    reconnect: float = 2.0,
    trust: Collection[int] | None = None,
) -> AsyncClient:
    """An AsyncClient of the server at *path*, to be entered with `async with`.

    Entering it connects, and waits until the server has answered. The arguments are those of
    `fdshare.connect`. Entering raises: NoServer, UntrustedServer, AuthenticationFailed,
    ProtocolError, VersionMismatch, ServerTimeout, EndpointError.

    >>> async def names(path):
    ...     async with aio.connect(path) as client:
    ...         return await client.names()
    >>> with fdshare.Manager() as manager:
    ...     asyncio.run(names(manager.address))
    []
    """
    return AsyncClient(path, authkey=authkey, timeout=timeout, reconnect=reconnect, trust=trust)
