"""Caches of what was chosen, all of which :func:`torchhal.selection.reset` empties."""

from __future__ import annotations

from typing import Any, TypeVar

Cache = TypeVar("Cache", dict[Any, Any], list[Any])
_forgotten: list[dict[Any, Any] | list[Any]] = []


def forgotten_on_reset(cache: Cache) -> Cache:
    """The same cache, which a reset empties from now on."""
    _forgotten.append(cache)
    return cache


def fast_cache() -> dict[Any, Any]:
    """A dictionary of choices that a reset empties."""
    return forgotten_on_reset({})


def forget_all() -> None:
    """Empty every cache."""
    for cache in _forgotten:
        cache.clear()
