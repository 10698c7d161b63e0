"""Partial results over disjoint sets of keys, put together, against attention over all of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, Final

import torch

import torchhal
from torchhal_conformance import calls, tolerance
from torchhal_conformance.checks.numbers import DRAWS, FEW
from torchhal_conformance.families import attention
from torchhal_conformance.model import Check, CheckFailed, Explanation, Inputs, Measured, Outputs, Sample

LOW: Final = 1000.0
"""How far below zero the logits of a lowered call are: further than any floor that a running maximum may begin at."""

EXPLANATION: Final = Explanation(
    tests=(
        "Splits the keys into partitions, one without keys and, where masks are claimed, one whose keys are all masked; "
        "calls the backend for each, joins output and LSE with torchhal.merge_attention, and holds that against the float64 "
        "evaluation of the whole call. But in float64, once more with logits a thousand lower."
    ),
    why=(
        "Split keys, prefix caches and rings of devices are all merges. A partition without keys that reported an LSE of "
        "+inf (flash-attention #978) or was merged as NaN (flashinfer #4051) spoilt every result it met."
    ),
    debug=(
        "A result that is wrong only here has a wrong LSE: print it for the empty partition, which must be -inf, and compare "
        "the others with torch.logsumexp of their scores: natural logarithm, after masks, unrounded."
    ),
)


def partitions(keys: int) -> list[tuple[int, int]]:
    """Ends of the partitions: an empty one between two, and a single key."""
    half = keys // 2
    return [(0, half), (half, half), (half, half + 1), (half + 1, keys)]


def run(backend: str, sample: Sample, seed: int) -> Measured:
    """Merged partitions of an ordinary call, and of one with low logits."""
    worst = 0.0
    # In float64 the bound is a few ulp of the result, and less than an LSE of -1000 can keep.
    for lowered in (False,) if torch.float64 in sample.needs.dtypes else (False, True):
        draws = [_draw(backend, sample, seed, lowered)]
        if any(t.numel() < FEW for t in draws[0][1]):
            draws += [_draw(backend, sample, seed + number, lowered) for number in range(1, DRAWS)]
        found, exact, plain = (
            [torch.cat([t.flatten() for t in each]) for each in zip(*c)] for c in zip(*draws)
        )
        names = [f"merged {name}" + " of low logits" * lowered for name in ("output", "LSE")]
        worst = max(worst, tolerance.judge(found, exact, plain, tolerance.FORWARD, names))
    return Measured(worst)


def _draw(backend: str, sample: Sample, seed: int, lowered: bool) -> tuple[Outputs, Outputs, Outputs]:
    inputs = calls.make(sample, backend, seed)
    with calls.harness():
        inputs = _lowered(inputs) if lowered else inputs
        parts = list(_parts(inputs))
    found = [calls.call(sample, backend, part) for part in parts]
    for part, results in zip(parts, found):
        _require_partial(part, results)
    merged = torchhal.merge_attention([out for out, _ in found], [lse for _, lse in found])
    return merged, *calls.truth(sample, inputs)


def _lowered(inputs: Inputs) -> Inputs:
    """The first element of each row is the query's 1 and the key's logit."""
    changed = {**inputs, "query": inputs["query"].clone(), "key": inputs["key"].clone()}
    changed["query"][..., 0] = 1.0
    changed["key"][..., 0] = -LOW * inputs["query"].shape[-1] ** 0.5
    return changed


def _parts(inputs: Inputs) -> Iterator[Inputs]:
    """The call over each partition; where it has a mask, once more over all keys with every one of them masked."""
    for begin, end in partitions(inputs["key"].shape[2]):
        yield _part(inputs, begin, end)
    if "mask" in inputs:
        mask = inputs["mask"]
        hidden: Any = False if mask.dtype is torch.bool else -math.inf
        yield {**inputs, "mask": torch.full_like(mask, hidden)}


def _part(inputs: Inputs, begin: int, end: int) -> Inputs:
    part = {**inputs, **{name: inputs[name][:, :, begin:end] for name in ("key", "value")}}
    if "mask" in inputs:
        part["mask"] = inputs["mask"][..., begin:end]
    return part


def _require_partial(part: Inputs, results: Outputs) -> None:
    if len(results) != 2:
        raise CheckFailed("an output and an LSE", f"{len(results)} results")
    empty = part["key"].shape[2] == 0
    if empty and not torch.isneginf(results[1]).all():
        raise CheckFailed("an LSE of -inf for a partition without keys", results[1].flatten()[:4].tolist())


def samples() -> Iterator[Sample]:
    """Ordinary calls with an LSE, plain and with masks, in every type."""
    for dtype in attention.FLOATS:
        plain = attention.Call(dtype=dtype, lse=True, rows=17, keys=33)
        yield attention.sample(plain)
        yield attention.sample(dataclasses.replace(plain, heads=6, kv_heads=2, value_size=5))
        yield attention.sample(dataclasses.replace(plain, mask="boolean"))
        yield attention.sample(dataclasses.replace(plain, mask="additive"))


def checks() -> Iterator[Check]:
    """One."""
    yield Check("attention.merge", EXPLANATION, samples, run)
