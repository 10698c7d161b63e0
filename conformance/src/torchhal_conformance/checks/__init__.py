"""Every check, gathered from one file for each family and contract.

A file has a function ``checks()``. Its checks come with an explanation, and a check that no mutant proves
(:mod:`torchhal_conformance.mutants`) does not stay.
"""

from __future__ import annotations

import functools
from importlib import import_module
from typing import Final

from torchhal_conformance.model import Check

FILES: Final = (
    "numbers", "foreach", "exactness", "gradients", "promises", "compiled", "memory", "cache_store", "deployment", "context_parallel",
    "device", "batch_invariance", "gradcheck", "errors", "far", "merging", "own_work", "fingerprints",
)  # fmt: skip
"""Files of checks over samples, in the order in which their cases run; :mod:`.contract` is what ``smoke`` runs."""


@functools.cache
def all_checks() -> tuple[Check, ...]:
    """Every check, by name unique."""
    found = [check for name in FILES for check in import_module(f"{__name__}.{name}").checks()]
    names = [check.name for check in found]
    assert len(names) == len(set(names)), sorted(names)
    return tuple(found)


def check_named(name: str) -> Check:
    """The check with a name.

    Raises:
        KeyError: there is none.
    """
    return {check.name: check for check in all_checks()}[name]
