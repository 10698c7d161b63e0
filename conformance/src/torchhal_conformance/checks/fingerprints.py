"""Does a store keep apart what was made in different environments?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torchhal
from torchhal.cache import CacheStore, default_key
from torchhal_conformance.checks.cache_store import SCHEMES, _place, _require, _stores
from torchhal_conformance.model import Check, Explanation, Measured, Sample

SECTION: Final = "0123456789abcdef"


def strangers(key: str) -> tuple[str, ...]:
    """Keys of other environments, each of which differs from ``key`` in little: an end, a beginning, a length."""
    last = "0" if key[-1] != "0" else "1"
    head, _, digest = key.partition("-")
    first = "0" if digest[0] != "0" else "1"
    return (key[:-1] + last, f"{head}-{first}{digest[1:]}", key[:-1], key + "0", f"{head}-{digest[::-1]}")


def run(backend: str, sample: Sample, seed: int) -> Measured:
    """What one environment put, the others do not find, under no method; and their own does not replace it."""
    with _place(sample.needs.choice) as (url, _):
        store = torchhal.cache_store(url, backend=backend)
        key = default_key()
        mine = f"{key}/{SECTION}"
        store.put(mine, b"made here")
        for other in strangers(key):
            _require_absent(store, other)
        for number, other in enumerate(strangers(key)):
            store.put(f"{other}/{SECTION}", b"made elsewhere %d" % number)
        _require(b"made here", store.get(mine), f"the entry of this environment, {key!r}, to stay")
        for number, other in enumerate(strangers(key)):
            found = store.get(f"{other}/{SECTION}")
            _require(b"made elsewhere %d" % number, found, f"the entry of the environment {other!r}")
            _require([f"{other}/{SECTION}"], list(store.list(f"{other}/")), f"the keys of {other!r} alone")
    return Measured()


def _require_absent(store: CacheStore, other: str) -> None:
    what = f"nothing for the environment {other!r}, in which nothing was made"
    _require(None, store.get(f"{other}/{SECTION}"), what)
    _require(False, store.exists(f"{other}/{SECTION}"), what)
    _require([], list(store.list(f"{other}/")), what)


def checks() -> Iterator[Check]:
    """One."""
    yield Check(
        "cache_store.fingerprints",
        Explanation(
            "Puts an entry under the key of this environment's fingerprint, and asks for it under keys of fingerprints that "
            "differ in one character, in order and in length: nothing is found, and what those put replaces nothing.",
            "The fingerprint in the key keeps code for other instructions and other versions of torch away; a store that "
            "shortens names, or compares a part of them, gives it to the wrong machine, which ends at an illegal instruction "
            "or, worse, does not.",
            "Look for a key that is cut, hashed to a few digits or looked up by its beginning.",
        ),
        _stores(*SCHEMES),
        run,
    )
