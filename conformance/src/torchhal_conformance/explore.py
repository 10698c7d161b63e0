"""Random cases: they look where the corpus does not, and tell, but never decide."""

from __future__ import annotations

import dataclasses
import random
from typing import Final

from torchhal_conformance.checks import check_named
from torchhal_conformance.families import attention
from torchhal_conformance.families.mods import MASK_MODS, SCORE_MODS
from torchhal_conformance.model import Case

SIZES: Final = (1, 2, 3, 4, 5, 7, 8, 11, 15, 16, 17, 24, 31, 32, 33, 48, 63, 64, 65, 96, 100, 127, 128, 129)


def names(count: int, seed: int) -> list[str]:
    """Names of ``count`` random cases; a name and the seed say all of a case."""
    return [f"explore.attention/{number}" for number in range(count)]


def case_named(name: str, seed: int) -> Case:
    """The random case with the id that a report gives it.

    Raises:
        KeyError: another seed made it.
    """
    found = random_case(f"explore.attention/{name.partition('/')[2].partition('-')[0]}", seed)
    if found.id != name:
        raise KeyError(f"there is no random case {name!r} of seed {seed}; give the --seed of the report")
    return found


def random_case(name: str, seed: int) -> Case:
    """The random case of a name."""
    call = _random_call(random.Random(f"{seed}/{name}"))
    sample = dataclasses.replace(attention.sample(call), name=f"{name.partition('/')[2]}-{call.name}")
    return Case(check_named("attention.numbers"), sample, kind="explore", seed=seed)


def _random_call(draw: random.Random) -> attention.Call:
    layout = draw.choice(["dense", "dense", "dense", "varlen", "paged"])
    kv_heads = draw.choice([1, 1, 2, 3])
    size = draw.choice(SIZES)
    rows = draw.choice(SIZES)
    keys = max(draw.choice([*SIZES, 257, 300]), rows if layout == "paged" else 1)
    call = attention.Call(
        layout=layout, dtype=draw.choice(attention.FLOATS), batch=draw.choice([1, 2, 3]),
        heads=kv_heads * draw.choice([1, 2, 3, 5]), kv_heads=kv_heads, rows=rows, keys=keys, size=size,
        value_size=draw.choice([size, size, draw.choice(SIZES)]), causal=draw.random() < 0.4,
        lse=draw.random() < 0.4, page=draw.choice([1, 2, 5, 16]), scale=draw.choice([None, None, 0.1, 1.0]),
    )  # fmt: skip
    if draw.random() < 0.3:
        call = dataclasses.replace(call, score_mod=draw.choice(sorted(SCORE_MODS)))
    if draw.random() < 0.3 and layout != "paged":
        call = dataclasses.replace(call, mask_mod=draw.choice(sorted(set(MASK_MODS) - {"document"})))
    if layout == "dense" and not call.mask_mod and draw.random() < 0.4:
        letters = "".join(draw.choice(pair) for pair in ("1b", "1h", "1l", "1k"))
        call = dataclasses.replace(call, mask=f"{draw.choice(['boolean', 'additive'])}:{letters}")
    return call
