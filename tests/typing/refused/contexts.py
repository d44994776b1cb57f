"""Wrong uses of a context."""

from __future__ import annotations

import fdshare


def size(text: str) -> int:
    return len(text)


context = fdshare.get_context("spawn")
fdshare.get_context(3)  # refused
fdshare.get_context(backend=None)  # refused
fdshare.get_contexts()  # refused
context.Queue(3).foo()  # refused
context.Queue("three")  # refused
context.Queues()  # refused
one, two, three = context.Pipe()  # refused
context.Process(size)  # refused
context.Process(target=size).begin()  # refused
with context.Pool(2) as pool:
    wrong: str = pool.apply(size, ("text",))  # refused
    pool.map(size, [1, 2])  # refused
