"""Which half of a server dies, in which order; and a kind for what is registered by hand."""

from __future__ import annotations

import pytest
from breaking import (
    Half,
)
from conftest import wait_until
from nursery import Manager

from fdshare.protocol import messages as m

# Which half dies, in this order.
ALL: list[list[Half]] = [
    ["server"],
    ["keeper"],
    ["server", "keeper"],
    ["keeper", "server"],
    ["server", "server"],
    ["keeper", "keeper"],
    ["keeper", "server", "keeper", "server"],
]


SOME: list[list[Half]] = [["server"], ["keeper"], ["keeper", "server", "keeper"]]


KIND = m.Kind("fd", m.encode({}))


WITH_NONE: list[list[Half]] = [[], ["server"], ["keeper"], ["keeper", "server"]]


def deaths(orders: list[list[Half]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("order", orders, ids=lambda order: "-".join(order) or "none")


def gone(manager: Manager, name: str = "a") -> None:
    wait_until(lambda: name not in manager, f"{name} is gone")
