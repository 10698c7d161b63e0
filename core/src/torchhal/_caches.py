"""Caches of what was chosen, all of which :func:`torchhal.selection.reset` empties."""

from __future__ import annotations

from typing import Any, Final, TypeVar

REMEMBERED: Final = 4096
"""Choices kept. A function that closes over a number that changes makes a new problem at every call."""

Cache = TypeVar("Cache", dict[Any, Any], list[Any])
_forgotten: list[dict[Any, Any] | list[Any]] = []


def forgotten_on_reset(cache: Cache) -> Cache:
    """The same cache, which a reset empties from now on."""
    _forgotten.append(cache)
    return cache


class Bounded(dict[Any, Any]):
    """Forgets its oldest entry for one too many.

    Args:
        most: entries kept; :data:`REMEMBERED` by default.
    """

    def __init__(self, most: int | None = None) -> None:
        super().__init__()
        self.most = most

    def __setitem__(self, key: Any, value: Any) -> None:
        if len(self) >= (self.most or REMEMBERED) and key not in self:
            self.pop(next(iter(self)), None)
        super().__setitem__(key, value)


def fast_cache() -> dict[Any, Any]:
    """A dictionary of the last :data:`REMEMBERED` choices, which a reset empties."""
    return forgotten_on_reset(Bounded())


def forget_all() -> None:
    """Empty every cache."""
    for cache in _forgotten:
        cache.clear()
