"""Subscriptions: who waits for which names; an event costs one look-up, and one test a pattern.

Thousands may wait for one name each, and thousands may watch the same few patterns. So a plain name
is found in a dictionary, and each pattern with wildcards is tested once for all that share it. The
server and the asynchronous client both use it to route events.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from fdshare.protocol.names import has_wildcards, matcher

__all__ = ["Subscriptions"]

S = TypeVar("S", bound=Hashable)


class Subscriptions(Generic[S]):
    """A multiset of (pattern, subscriber), *count* in all."""

    def __init__(self) -> None:
        self.count = 0
        self._plain: dict[str, dict[S, int]] = {}
        self._wild: dict[str, tuple[Callable[[str], object], dict[S, int]]] = {}

    def add(self, pattern: str, subscriber: S) -> None:
        """Finds *subscriber* for names that match, until it is removed as often as it was added."""
        counts = self._counts(pattern)
        self.count += 1
        counts[subscriber] = counts.get(subscriber, 0) + 1

    def remove(self, pattern: str, subscriber: S) -> None:
        """Undoes one `add`; KeyError where there was none."""
        wild = has_wildcards(pattern)
        counts = self._wild[pattern][1] if wild else self._plain[pattern]
        counts[subscriber] -= 1
        self.count -= 1
        if not counts[subscriber]:
            del counts[subscriber]
        if not counts:
            del (self._wild if wild else self._plain)[pattern]

    def of(self, *names: str) -> list[S]:
        """The subscribers of at least one of *names*, each once, in any order."""
        found: dict[S, None] = {}
        for name in names:
            if name in self._plain:
                found.update(dict.fromkeys(self._plain[name]))
        for matches, counts in self._wild.values():
            if any(map(matches, names)):
                found.update(dict.fromkeys(counts))
        return list(found)

    def subscribers(self) -> list[S]:
        """All of them, each once, in any order."""
        found: dict[S, None] = {}
        for counts in (*self._plain.values(), *(counts for _, counts in self._wild.values())):
            found.update(dict.fromkeys(counts))
        return list(found)

    def _counts(self, pattern: str) -> dict[S, int]:
        if not has_wildcards(pattern):
            return self._plain.setdefault(pattern, {})
        known = self._wild.get(pattern)
        if known is None:
            known = self._wild[pattern] = (matcher(pattern), {})
        return known[1]
