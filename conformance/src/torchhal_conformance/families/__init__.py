"""Samples of each family: calls with data and truth, generated from what the specification has words for."""

from __future__ import annotations

import functools
from collections.abc import Iterable

from torchhal_conformance.model import Sample


@functools.cache
def samples(family: str) -> tuple[Sample, ...]:
    """Every sample of a family, in a fixed order.

    Raises:
        ValueError: two of them have one name.
    """
    from importlib import import_module

    found: Iterable[Sample] = import_module(f"{__name__}.{family}").samples()
    listed = tuple(found)
    names = [sample.name for sample in listed]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(f"samples of {family} with one name: {', '.join(sorted(twice))}")
    return listed
