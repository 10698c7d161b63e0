"""Which attention calls the corpus is made of."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any, Final

import torch

from torchhal_conformance.families.attention import FLOATS, Call
from torchhal_conformance.families.mods import PRIMITIVE_MODS
from torchhal_conformance.families.primitives import FEW, PREFIX
from torchhal_conformance.families.quantized import SCALED, STORED

SHAPES: Final[tuple[dict[str, int], ...]] = (
    {"rows": 1, "keys": 1},
    {"batch": 1, "heads": 1, "kv_heads": 1, "rows": 1, "keys": 1, "size": 1, "value_size": 1},
    {"rows": 0},
    {"keys": 0},
    {"batch": 0},
    {"rows": 1, "keys": 257},
    {"rows": 1, "keys": 1031, "heads": 2, "kv_heads": 2},
    {"rows": 15, "keys": 17},
    {"rows": 16, "keys": 16},
    {"rows": 17, "keys": 15},
    {"rows": 63, "keys": 65, "heads": 2, "kv_heads": 2},
    {"rows": 64, "keys": 64, "size": 64, "value_size": 64, "heads": 2, "kv_heads": 2},
    {"rows": 65, "keys": 63, "size": 80, "value_size": 80, "heads": 2, "kv_heads": 2},
    {"rows": 127, "keys": 129, "heads": 2, "kv_heads": 2},
    {"rows": 131, "keys": 257, "size": 72, "value_size": 72, "batch": 1, "heads": 3, "kv_heads": 3},
    {"rows": 33, "keys": 29, "size": 3, "value_size": 3},
    {"rows": 7, "keys": 31, "size": 128, "value_size": 128},
    {"rows": 5, "keys": 37, "size": 192, "value_size": 128},
    {"rows": 2, "keys": 19, "size": 256, "value_size": 256, "batch": 1},
    {"rows": 9, "keys": 11, "size": 17, "value_size": 5},
    {"rows": 11, "keys": 23, "size": 8, "value_size": 40},
    {"rows": 3, "keys": 700, "batch": 1, "heads": 2, "kv_heads": 2, "size": 32, "value_size": 32},
)
GROUPS: Final = ((3, 1), (6, 2), (5, 1), (7, 1), (14, 2), (8, 1))
"""Query and key heads: groups of 3, 3, 5, 7, 7 and 8."""

FEATURES: Final[tuple[dict[str, Any], ...]] = (
    {"causal": True},
    {"causal": True, "rows": 13, "keys": 9},
    {"causal": True, "rows": 40, "keys": 70},
    {"lse": True},
    {"lse": True, "causal": True, "rows": 17, "keys": 5},
    {"scale": 0.0},
    {"scale": -0.5},
    {"scale": 3.0, "lse": True},
    {"scale": 30.0, "lse": True},
    {"mask": "boolean"},
    {"mask": "boolean:k"},
    {"mask": "boolean:lk"},
    {"mask": "boolean:b11k", "lse": True},
    {"mask": "boolean:1hl1"},
    {"mask": "additive"},
    {"mask": "additive:lk", "lse": True},
    {"mask": "additive:1h1k"},
    {"score_mod": "soft_cap"},
    {"score_mod": "distance", "lse": True, "causal": True},
    {"score_mod": "alibi", "causal": True, "rows": 33, "keys": 33},
    {"score_mod": "relative"},
    {"score_mod": "per_batch"},
    {"mask_mod": "window", "rows": 40, "keys": 40, "lse": True},
    {"mask_mod": "prefix", "rows": 21, "keys": 34},
    {"mask_mod": "document", "rows": 50, "keys": 50, "block": 16},
    {"mask_mod": "nothing", "lse": True},
    {"mask_mod": "window", "score_mod": "soft_cap", "rows": 30, "keys": 30},
    {"maxima": True},
    {"maxima": True, "lse": True, "causal": True, "rows": 33, "keys": 20, "scale": -0.3},
    {"maxima": True, "score_mod": "alibi", "mask_mod": "window", "rows": 40, "keys": 40},
    {"maxima": True, "mask": "additive:1h1k", "heads": 6, "kv_heads": 2},
    {"maxima": True, "rows": 1, "keys": 1001, "heads": 8, "kv_heads": 2},
    {"dropout": 0.3, "rows": 33, "keys": 70},
    {"dropout": 0.9, "causal": True, "lse": True},
    {"dropout": 1.0},
    {"score_mod": "sink"},
    {"score_mod": "sink", "causal": True, "lse": True, "rows": 17, "keys": 33, "heads": 6, "kv_heads": 2},
    {"sink": True},
    {"sink": True, "causal": True, "lse": True, "rows": 17, "keys": 33, "heads": 6, "kv_heads": 2},
)
LAYOUT_FEATURES: Final[tuple[dict[str, Any], ...]] = (
    {},
    {"causal": True},
    {"lse": True, "causal": True},
    {"maxima": True, "causal": True, "score_mod": "soft_cap"},
    {"heads": 6, "kv_heads": 2},
    {"value_size": 5},
    {"score_mod": "soft_cap"},
    {"score_mod": "alibi"},
    {"mask_mod": "window"},
    {"rows": 1, "keys": 33, "heads": 8, "kv_heads": 1},
    {"score_mod": "sink", "causal": True},
    {"sink": True, "causal": True, "lse": True},
)
PAGES: Final = (1, 3, 4, 16)
QUANTIZED: Final[tuple[dict[str, Any], ...]] = (
    {"rows": 2},
    {"rows": 1, "keys": 67, "heads": 8, "kv_heads": 1, "page": 16},
    {"rows": 3, "causal": True, "lse": True, "heads": 6, "kv_heads": 2, "value_size": 5, "page": 3},
    {"rows": 33, "keys": 70, "causal": True, "size": 40, "value_size": 24, "page": 5},
    {
        "rows": 9,
        "keys": 40,
        "score_mod": "alibi",
        "mask_mod": "window",
        "size": 17,
        "value_size": 17,
        "page": 7,
    },
)
"""Calls over quantised pages: for few query rows and for many, of sizes that fill no vector."""
GRADIENTS: Final[tuple[dict[str, Any], ...]] = (
    {"gradient": "inputs"},
    {"gradient": "inputs", "lse": True},
    {"gradient": "inputs", "causal": True, "rows": 17, "keys": 5, "lse": True},
    {"gradient": "inputs", "heads": 6, "kv_heads": 2},
    {"gradient": "inputs", "value_size": 5},
    {"gradient": "inputs", "rows": 65, "keys": 70, "causal": True},
    {"gradient": "inputs", "dropout": 0.4, "rows": 20, "keys": 30},
    {"gradient": "inputs", "mask": "boolean"},
    {"gradient": "mask", "mask": "additive"},
    {"gradient": "mask", "mask": "additive:1h1k", "lse": True},
    {"gradient": "inputs", "score_mod": "soft_cap"},
    {"gradient": "captured", "score_mod": "alibi"},
    {"gradient": "captured", "score_mod": "relative", "lse": True},
    {"gradient": "inputs", "mask_mod": "window", "rows": 30, "keys": 30},
    {"gradient": "inputs", "layout": "varlen", "causal": True, "batch": 4},
    {"gradient": "captured", "layout": "varlen", "score_mod": "alibi", "batch": 4},
    {"gradient": "captured", "score_mod": "sink", "lse": True},
    {"gradient": "captured", "layout": "varlen", "score_mod": "sink", "batch": 4, "causal": True},
    {"gradient": "captured", "layout": "paged", "score_mod": "sink", "rows": 2},
    {"gradient": "inputs", "sink": True, "lse": True},
    {"gradient": "inputs", "layout": "varlen", "sink": True, "batch": 4, "causal": True},
    {"gradient": "inputs", "layout": "paged", "sink": True, "rows": 2},
)


def _of_primitives() -> Iterator[Call]:
    """A call for each primitive of the pointwise language, and for a few in the other types."""
    plain = Call(rows=3, keys=7, heads=2, kv_heads=2, size=8, value_size=8)
    for name in PRIMITIVE_MODS:
        yield dataclasses.replace(plain, score_mod=name)
    for name, dtype in itertools.product(FEW, FLOATS[1:]):
        yield dataclasses.replace(plain, score_mod=PREFIX + name, dtype=dtype)


def _with(call: Call, **changes: Any) -> Call:
    return dataclasses.replace(call, **changes)


def calls() -> Iterator[Call]:
    """Every call of the corpus."""
    for dtype in FLOATS:
        plain = Call(dtype=dtype)
        for shape in SHAPES:
            yield _with(plain, **shape)
        for heads, kv_heads in GROUPS:
            yield dataclasses.replace(plain, heads=heads, kv_heads=kv_heads, rows=3)
            yield dataclasses.replace(plain, heads=heads, kv_heads=kv_heads, rows=20, causal=True, lse=True)
        for changes in FEATURES:
            yield _with(plain, **changes)
        for changes in LAYOUT_FEATURES:
            yield _with(plain, **{"layout": "varlen", "batch": 4, **changes})
            yield _with(plain, **{"layout": "paged", "rows": 2, **changes})
        for page, beyond in itertools.product(PAGES, (-1, 0, 1)):
            keys = 2 * page + beyond
            yield dataclasses.replace(
                plain, layout="paged", page=page, keys=keys, rows=1, batch=3, causal=True
            )
        for stored, scaled in itertools.product(STORED, SCALED):
            for changes in QUANTIZED if dtype is torch.float32 else QUANTIZED[:1]:
                yield _with(plain, **{"layout": "paged", "stored": stored, "scaled": scaled, **changes})
        for changes in GRADIENTS:
            yield _with(plain, **changes)
    yield Call(layout="varlen", batch=4, dropout=0.25)
    yield Call(rows=1, keys=65537, batch=1, heads=1, kv_heads=1, size=8, value_size=8, lse=True)
    yield Call(rows=2049, keys=2047, batch=1, heads=1, kv_heads=1, size=8, value_size=8, causal=True)
    yield Call(key_dtype=torch.bfloat16)
    yield Call(dtype=torch.bfloat16, key_dtype=torch.float32, lse=True)
    yield from _of_primitives()
