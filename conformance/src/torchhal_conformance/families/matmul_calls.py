"""Which fused products the corpus is made of."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any, Final

import torch

from torchhal_conformance.families.blocks import KINDS
from torchhal_conformance.families.fusions import PLACES, PRIMITIVE_FUNCTIONS
from torchhal_conformance.families.matmul import FLOATS, Call
from torchhal_conformance.families.primitives import FEW, PREFIX


def _size(rows: int, columns: int, inner: int) -> dict[str, int]:
    return {"rows": rows, "columns": columns, "inner": inner}


SIZES: Final = tuple(
    _size(*each)
    for each in (
        (1, 1, 1), (1, 1, 0), (0, 7, 5), (7, 0, 5), (7, 5, 0), (0, 0, 0), (1, 127, 64), (127, 1, 65), (1, 1, 127),
        (16, 16, 16), (17, 16, 16), (16, 17, 16), (16, 16, 17), (7, 33, 1), (33, 7, 127), (64, 64, 64), (65, 64, 33),
        (64, 65, 127), (65, 127, 65), (127, 127, 127), (33, 17, 300), (5, 3, 1031),
    )
)  # fmt: skip
FEATURES: Final[tuple[dict[str, Any], ...]] = (
    {"a_batch": (3,), "b_batch": (3,)},
    {"a_batch": (3,)},
    {"b_batch": (2,)},
    {"a_batch": (2, 1), "b_batch": (3,)},
    {"a_batch": (1,), "b_batch": (4,), "bias": "own"},
    {"a_batch": (0,), "b_batch": (1,)},
    {"a_batch": (2,), "b_batch": (2,), "inner": 0, "bias": "own"},
    {"a_memory": "transposed"},
    {"b_memory": "transposed", "rows": 17, "columns": 33},
    {"a_memory": "transposed", "b_memory": "transposed", "rows": 33, "columns": 17, "inner": 65},
    {"a_memory": "gaps", "b_memory": "gaps"},
    {"a_memory": "gaps", "b_memory": "transposed", "a_batch": (2,), "b_batch": (2,)},
    {"a_memory": "expanded", "a_batch": (3,), "b_batch": (3,)},
    {"a_memory": "offset", "b_memory": "offset", "rows": 17, "columns": 33},
    {"b_memory": "expanded", "b_batch": (3,), "columns": 16, "inner": 32},
    {"vectors": "a", "rows": 1, "columns": 33},
    {"vectors": "b", "columns": 1, "rows": 17},
    {"vectors": "ab", "rows": 1, "columns": 1, "inner": 65},
    {"vectors": "a", "rows": 1, "b_batch": (2,), "epilogue": "ramp"},
    {"bias": "own"},
    {"bias": "float32", "rows": 17, "columns": 65},
    {"bias": "own", "inner": 0, "epilogue": "gelu"},
    *({"a_prologue": name} for name in ("relu", "scaled", "dropped", "by_column", "by_row", "by_number")),
    *({"b_prologue": name} for name in ("relu", "ramp", "by_row", "by_column")),
    {"a_prologue": "constant", "b_prologue": "constant"},
    {"a_prologue": "by_batch", "a_batch": (1,), "b_batch": (3,)},
    {"b_prologue": "by_batch", "a_batch": (2, 1), "b_batch": (3,)},
    {"a_prologue": "relu", "b_prologue": "scaled", "epilogue": "silu", "bias": "own"},
    *({"epilogue": name} for name in ("gelu", "gelu_tanh", "silu", "scaled", "soft_cap", "by_number")),
    *({"epilogue": name, "rows": 17, "columns": 33} for name in ("ramp", "triangle", "residual", "gated")),
    *({"epilogue": name, "rows": 33, "columns": 17} for name in ("by_column", "by_row", "shifted")),
    {"epilogue": "residual", "a_batch": (2,)},
    {"epilogue": "per_batch", "a_batch": (2, 1), "b_batch": (3,)},
    {"epilogue": "per_batch", "b_batch": (2,), "bias": "float32"},
    {"epilogue": "gelu", "bias": "own", "rows": 65, "columns": 65, "inner": 33},
    {"epilogue": "two", "bias": "own"},
    {"epilogue": "three", "rows": 17, "columns": 19},
    {"epilogue": "two", "out_dtype": (torch.float32, torch.bfloat16)},
    *({"out_dtype": (dtype,), "inner": 65} for dtype in (torch.float32, torch.bfloat16, torch.float16)),
    {"epilogue": "three", "out_dtype": (torch.float32,)},
)
MIXED: Final = (
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.float16),
    (torch.float64, torch.float32),
)
PACKED: Final[tuple[dict[str, Any], ...]] = tuple(
    {"bits": bits, **changes}
    for bits in (8, 4)
    for changes in (
        {},
        {"symmetric": False},
        {"inner": 64, "group": 32, "columns": 33},
        {"inner": 65, "group": 32, "symmetric": False},
        {"inner": 127, "group": 64, "columns": 17, "rows": 1},
        {"inner": 300, "group": 128, "symmetric": False, "rows": 33, "columns": 65},
        {"inner": 33, "group": 32, "from_transposed": True},
        {"inner": 1, "rows": 1, "columns": 1},
        {"inner": 17, "a_batch": (2, 3), "bias": "own"},
        {"inner": 65, "bias": "own", "epilogue": "gelu", "a_prologue": "by_column", "group": 64},
        {"inner": 33, "b_prologue": "by_column"},
        {"inner": 65, "gradient": "inputs", "bias": "own", "symmetric": False, "group": 32},
    )
)  # fmt: skip
BLOCKS: Final[tuple[dict[str, Any], ...]] = tuple(
    {"gguf": kind, **changes}
    for kind in KINDS
    for changes in (
        {"inner": 32},
        {"inner": 96, "rows": 1, "columns": 33},
        {"inner": 320, "rows": 33, "columns": 65},
        {"inner": 64, "rows": 4, "columns": 1},
        {"inner": 0, "bias": "own"},
        {"inner": 64, "a_batch": (2, 3), "bias": "own"},
        {"inner": 64, "bias": "own", "epilogue": "gelu", "a_prologue": "by_column"},
        {"inner": 32, "b_prologue": "by_column"},
        {"inner": 64, "gradient": "inputs", "bias": "own", "epilogue": "silu"},
    )
)
GRADIENTS: Final[tuple[dict[str, Any], ...]] = (
    {"gradient": "inputs"},
    {"gradient": "inputs", "bias": "own", "rows": 33, "columns": 17, "inner": 65},
    {"gradient": "inputs", "bias": "float32", "epilogue": "gelu"},
    {"gradient": "inputs", "epilogue": "silu", "a_prologue": "scaled", "b_prologue": "ramp"},
    {"gradient": "inputs", "a_batch": (2, 1), "b_batch": (3,), "bias": "own"},
    {"gradient": "inputs", "a_batch": (3,), "epilogue": "soft_cap"},
    {"gradient": "inputs", "epilogue": "two", "bias": "own"},
    {"gradient": "inputs", "a_memory": "transposed", "b_memory": "gaps"},
    {"gradient": "inputs", "vectors": "a", "rows": 1},
    {"gradient": "inputs", "epilogue": "triangle", "rows": 17},
    {"gradient": "captured", "epilogue": "residual"},
    {"gradient": "captured", "epilogue": "gated", "bias": "own"},
    {"gradient": "captured", "epilogue": "per_batch", "a_batch": (2, 1), "b_batch": (3,)},
    {"gradient": "captured", "a_prologue": "by_column", "b_prologue": "by_row", "epilogue": "gated"},
    {"gradient": "captured", "epilogue": "three"},
)  # fmt: skip


def _of_primitives() -> Iterator[Call]:
    """Each primitive of the pointwise language in each place, and a few in the other types."""
    plain = Call(rows=3, columns=7, inner=5)
    for place, name in itertools.product(PLACES, PRIMITIVE_FUNCTIONS):
        changes: dict[str, Any] = {place: name}
        yield dataclasses.replace(plain, **changes)
    for place, name, dtype in itertools.product(PLACES, FEW, FLOATS[1:]):
        changes = {place: PREFIX + name, "dtype": dtype}
        yield dataclasses.replace(plain, **changes)


def calls() -> Iterator[Call]:
    """Every call of the corpus."""
    for dtype in FLOATS:
        plain = Call(dtype=dtype)
        for changes in (*SIZES, *FEATURES, *GRADIENTS):
            yield dataclasses.replace(plain, **changes)
        if dtype is not torch.float64:  # dequantisation is said to be float32's
            for changes in (*PACKED, *BLOCKS):
                yield dataclasses.replace(plain, **changes)
    for dtype, b_dtype in MIXED:
        mixed = Call(dtype=dtype, b_dtype=b_dtype)
        yield mixed
        yield dataclasses.replace(mixed, bias="own", epilogue="gelu", b_memory="transposed", inner=65)
        yield dataclasses.replace(mixed, gradient="inputs", bias="own")
    yield Call(dtype=torch.bfloat16, b_dtype=torch.float32, bits=8, inner=33)
    yield Call(dtype=torch.float32, b_dtype=torch.float16, bits=4, inner=33, group=32)
    yield Call(dtype=torch.bfloat16, b_dtype=torch.float32, gguf="q4_1", inner=64)
    yield from _of_primitives()
