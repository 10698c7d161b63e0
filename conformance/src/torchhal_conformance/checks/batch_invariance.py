"""Where a plan promises that no row's bits depend on the rest of the batch: is that so?"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
from torch import Tensor

from torchhal_conformance import calls
from torchhal_conformance.families import attention, matmul
from torchhal_conformance.model import Check, CheckFailed, Explanation, Inputs, Measured, Outputs, Sample

Part = tuple[str, Inputs, Callable[[Tensor], Tensor]]
"""What a smaller batch is called, its inputs, and where its results are in those of the full one."""
Split = Callable[[Inputs], Iterator[Part]]


def _run(backend: str, sample: Sample, seed: int, split: Split) -> Measured:
    inputs = calls.make(sample, backend, seed)
    plan = calls.plan_of(sample, backend, inputs)
    if plan is None or not plan.batch_invariant:
        return Measured(note="the plan does not promise it")
    whole = calls.call(sample, backend, inputs)
    for what, part, of_whole in split(inputs):
        _require_same(calls.call(sample, backend, part), tuple(of_whole(t) for t in whole), what)
    return Measured()


def _require_same(alone: Outputs, within: Outputs, what: str) -> None:
    if len(alone) != len(within) or not all(calls.same_bits(a, b) for a, b in zip(alone, within)):
        raise CheckFailed(f"{what} to have the bits that it has in the full batch", "others")


def _ranges(count: int) -> Iterator[tuple[str, int, int]]:
    """Each entry alone, the first half, and all but the first."""
    for first in range(count):
        yield f"entry {first} alone", first, first + 1
    if count > 2:
        yield f"the first {count // 2} of {count} entries", 0, count // 2
        yield f"the last {count - 1} of {count} entries", 1, count


# ---------------------------------------------------------------------------- attention


def _attention_parts(inputs: Inputs) -> Iterator[Part]:
    if "cu_seqlens_q" in inputs:
        return _varlen_parts(inputs)
    return _dense_parts(inputs)


def _dense_parts(inputs: Inputs) -> Iterator[Part]:
    """Of dense and of paged calls: pages belong to no entry."""
    split = ("query", "page_table", "seq_lens") if "page_table" in inputs else ("query", "key", "value")
    for what, first, end in _ranges(inputs["query"].shape[0]):
        part = dict(inputs)
        for name in split:
            part[name] = inputs[name][first:end].clone()
        mask = inputs.get("mask")
        if mask is not None and mask.dim() == 4 and mask.shape[0] > 1:
            part["mask"] = mask[first:end].clone()
        yield what, part, lambda t, first=first, end=end: t[first:end]  # type: ignore[misc]


def _varlen_parts(inputs: Inputs) -> Iterator[Part]:
    ends = {name: inputs[f"cu_seqlens_{name}"].tolist() for name in "qk"}
    for what, first, end in _ranges(len(ends["q"]) - 1):
        rows, keys = (slice(ends[name][first], ends[name][end]) for name in "qk")
        part = dict(inputs)
        part["query"] = inputs["query"][rows].clone()
        part["key"], part["value"] = inputs["key"][keys].clone(), inputs["value"][keys].clone()
        for name in "qk":
            given = inputs[f"cu_seqlens_{name}"]
            part[f"cu_seqlens_{name}"] = (given[first : end + 1] - given[first]).contiguous()
        yield what, part, lambda t, rows=rows: t[rows]  # type: ignore[misc]


KINDS: Final[tuple[dict[str, Any], ...]] = (
    {},
    {"batch": 9, "lse": True},
    {"rows": 1, "keys": 257, "heads": 8, "kv_heads": 2},
    {"rows": 1, "keys": 1031, "heads": 1, "kv_heads": 1, "size": 64, "value_size": 64},
    {"rows": 33, "keys": 65, "causal": True, "lse": True},
    {"rows": 64, "keys": 64, "size": 64, "value_size": 64, "heads": 2, "kv_heads": 1},
    {"mask": "boolean", "rows": 17},
    {"mask": "additive:b11k"},
    {"score_mod": "soft_cap"},
    {"score_mod": "alibi", "rows": 17, "keys": 33},
)
PACKED_KINDS: Final[tuple[dict[str, Any], ...]] = (
    {},
    {"rows": 33, "keys": 65, "causal": True, "lse": True},
    {"heads": 6, "kv_heads": 2, "rows": 17},
    {"mask_mod": "window", "rows": 20, "keys": 40},
)
PAGED_KINDS: Final[tuple[dict[str, Any], ...]] = (
    {"rows": 2},
    {"rows": 1, "keys": 257, "heads": 8, "kv_heads": 1, "page": 16},
    {"rows": 17, "keys": 65, "causal": True, "lse": True, "page": 3},
    {"score_mod": "alibi", "rows": 3, "keys": 33},
)


def _attention_calls() -> Iterator[attention.Call]:
    for dtype in attention.FLOATS:
        for layout, kinds in (("dense", KINDS), ("varlen", PACKED_KINDS), ("paged", PAGED_KINDS)):
            plain = attention.Call(layout=layout, dtype=dtype, batch=4 if layout == "varlen" else 5)
            for changes in kinds:
                yield dataclasses.replace(plain, **changes)


# ---------------------------------------------------------------------------- matmul


def _matmul_parts(inputs: Inputs) -> Iterator[Part]:
    a, b = inputs["a"], inputs["b"]
    for what, first, end in _ranges(a.shape[0] if a.dim() > 2 else 0):
        part = {**inputs, "a": a[first:end].clone()}
        if isinstance(b, Tensor) and b.dim() > 2:
            part["b"] = b[first:end].clone()
        yield what, part, lambda t, first=first, end=end: t[first:end]  # type: ignore[misc]
    rows = a.shape[-2]
    for first, end in {(0, 1), (rows - 1, rows), (0, rows // 2), (1, rows)}:
        if first < end:
            part = {**inputs, "a": a[..., first:end, :].clone()}
            yield f"rows {first} to {end} of {rows}", part, lambda t, f=first, e=end: t[..., f:e, :]  # type: ignore[misc]


MATMULS: Final[tuple[dict[str, Any], ...]] = (
    {"rows": 9},
    {"rows": 33, "inner": 65, "columns": 17},
    {"rows": 64, "inner": 300, "columns": 64, "bias": "own"},
    {"rows": 16, "inner": 1031, "columns": 5, "epilogue": "gelu"},
    {"a_batch": (4,), "b_batch": (4,)},
    {"a_batch": (5,), "rows": 17, "inner": 65, "bias": "own"},
    {"bits": 8, "rows": 17, "inner": 65},
)


def _matmul_calls() -> Iterator[matmul.Call]:
    for dtype in matmul.FLOATS:
        for changes in MATMULS:
            if not (dtype is torch.float64 and "bits" in changes):
                yield dataclasses.replace(matmul.Call(dtype=dtype), **changes)


# ---------------------------------------------------------------------------- checks


def attention_entries(backend: str, sample: Sample, seed: int) -> Measured:
    """Sequences alone and in smaller batches."""
    return _run(backend, sample, seed, _attention_parts)


def matmul_entries(backend: str, sample: Sample, seed: int) -> Measured:
    """Entries of the batch dimensions, and rows of ``a``, alone and in smaller batches."""
    return _run(backend, sample, seed, _matmul_parts)


EXPLANATION: Final = Explanation(
    "Where the plan promises batch_invariant: calls with every entry alone and in smaller batches (for matmul with single rows "
    "too), which have the bits that they have in the full batch. Without the promise a note says so.",
    "A server batches whatever has arrived. Where the order of a sum follows the size of the batch, the same prompt has another "
    "answer under load, and reinforcement learning samples from another model than it trains: the reason why language models "
    "at temperature 0 were found not to repeat themselves (Thinking Machines, 2025).",
    "Choose tiles, split sizes and kernels by the problem and by the lengths of one sequence, never by the number of sequences "
    "or of free threads; or do not make the promise.",
)


def checks() -> Iterator[Check]:
    """For the families whose calls have a batch."""
    yield Check(
        "attention.batch_invariance",
        EXPLANATION,
        lambda: (attention.sample(call) for call in _attention_calls()),
        attention_entries,
    )
    yield Check(
        "matmul.batch_invariance",
        EXPLANATION,
        lambda: (matmul.sample(call) for call in _matmul_calls()),
        matmul_entries,
    )
