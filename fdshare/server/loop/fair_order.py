"""The order in which connections are served where more are ready than one turn of the loop serves.

epoll(7) reports first what was ready first. There who has hundreds of connections would be served
hundreds of times before the one connection of somebody else. So users are served in turn.
"""

from __future__ import annotations

from itertools import zip_longest
from operator import attrgetter
from typing import TypeAlias

from fdshare.server.core.users import User
from fdshare.server.loop.connection import Connection

__all__ = ["Ready", "fair_order"]

Ready: TypeAlias = tuple[object, int]  # key, events


def fair_order(ready: list[Ready]) -> list[Ready]:
    """*ready*: first what is no connection; then one connection of each user, then another one of
    each, and so on. Who was served longest ago is first, of the users and of each one's own."""
    order: list[Ready] = []
    of: dict[User, list[tuple[float, int, Ready]]] = {}
    for number, each in enumerate(ready):
        key = each[0]
        if type(key) is Connection:
            of.setdefault(key.session.user, []).append((key.served, number, each))
        else:
            order.append(each)
    for mine in of.values():
        mine.sort()
    users = sorted(of, key=attrgetter("served"))
    for row in zip_longest(*(of[user] for user in users)):
        order += [served[2] for served in row if served is not None]
    return order
