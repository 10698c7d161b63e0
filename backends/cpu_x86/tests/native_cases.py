"""Inputs, a float64 oracle and the accuracy rule for the tests of the native kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from torchhal_cpu_x86 import native

try:
    LIBRARY = native.load()
except native.NativeUnavailable as reason:
    pytest.skip(str(reason), allow_module_level=True)

OPS = torch.ops.torchhal_cpu_x86
INF = float("inf")
DTYPES = list(native.DTYPES)
SETS = LIBRARY.instruction_sets()
Tensor = torch.Tensor


@contextmanager
def forced(isa: str, dtype: torch.dtype) -> Iterator[None]:
    """An instruction set for a while."""
    before = LIBRARY.get_isa(dtype)
    LIBRARY.set_isa(dtype, isa)
    try:
        yield
    finally:
        LIBRARY.set_isa(dtype, before)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Torch's number of threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def respread(x: Tensor, how: str) -> Tensor:
    """The same values in other strides."""
    if how == "swapped":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if how == "sliced":
        wide = torch.full((*x.shape[:2], x.shape[2] + 3, x.shape[3] + 5), torch.nan, dtype=x.dtype)
        wide[:, :, 1:-2, 2:-3] = x
        return wide[:, :, 1:-2, 2:-3]
    if how == "every_second":
        wide = torch.full((*x.shape[:3], 2 * x.shape[3]), torch.nan, dtype=x.dtype)
        wide[..., ::2] = x
        return wide[..., ::2]
    return x.transpose(2, 3).contiguous().transpose(2, 3)


def inputs(
    batch: int,
    heads: int,
    kv_heads: int,
    length: int,
    keys: int,
    e: int,
    ev: int,
    dtype: torch.dtype,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, heads, length, e), (batch, kv_heads, keys, e), (batch, kv_heads, keys, ev))
    query, key, value = (torch.randn(s, generator=generator).to(dtype) for s in shapes)
    return query, key, value


def scores_and_live(
    query: Tensor, key: Tensor, causal: bool, scale: float, mask: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    group = query.shape[1] // key.shape[1]
    scores = query.to(dtype) @ key.to(dtype).repeat_interleave(group, 1).transpose(-1, -2) * scale
    live = torch.ones(scores.shape, dtype=torch.bool)
    if causal:
        live = live.tril()
    if mask is not None and mask.dtype == torch.bool:
        live = live & mask
    elif mask is not None:
        scores, live = scores + mask.to(dtype), live & (mask != -INF)
    return scores.masked_fill(~live, -INF), live


def oracle(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp in float64; masked keys take no part, whatever their values are."""
    scores, live = scores_and_live(query, key, causal, scale, mask, torch.float64)
    dead = ~live.any(-1)
    weights = torch.softmax(scores, -1).masked_fill(dead[..., None], 0.0)
    wide = value.double().repeat_interleave(query.shape[1] // key.shape[1], 1)
    if wide.isfinite().all():
        out = weights @ wide
    else:
        out = (weights[..., None] * wide[..., None, :, :]).masked_fill(~live[..., None], 0.0).sum(-2)
    lse = torch.logsumexp(scores, -1) if scores.shape[-1] else torch.full(scores.shape[:-1], -INF).double()
    return out.masked_fill(dead[..., None], 0.0), lse.masked_fill(dead, -INF)


def plain(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float, mask: Tensor | None = None
) -> Tensor:
    """What plain torch gives in the same dtype: scores and softmax in float32, weights rounded to the dtype."""
    scores, live = scores_and_live(query, key, causal, scale, mask, torch.float32)
    weights = torch.softmax(scores, -1).masked_fill(~live.any(-1, keepdim=True), 0.0).to(query.dtype)
    return weights @ value.repeat_interleave(query.shape[1] // key.shape[1], 1)


def run(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    if mask is None:
        return OPS.attention_lse(query, key, value, causal, scale)
    return OPS.masked_attention_lse(query, key, value, mask, causal, scale)


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool = False,
    scale: float | None = None,
    mask: Tensor | None = None,
) -> None:
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    out, lse = run(query, key, value, causal, factor, mask)
    expected, expected_lse = oracle(query, key, value, causal, factor, mask)
    assert out.dtype == query.dtype and out.shape == expected.shape
    if not out.numel():
        return
    error = out.double() - expected
    reference = plain(query, key, value, causal, factor, mask).double() - expected
    ulp = torch.finfo(query.dtype).eps
    assert error.abs().max() <= 2 * reference.abs().max() + 2 * ulp * expected.abs().max()
    assert rms(error) <= 2 * rms(reference) + ulp * rms(expected)
    limit = 4e-6 + 2e-6 * expected_lse.masked_fill(expected_lse.isinf(), 0.0).abs()
    assert torch.equal(lse.isneginf(), expected_lse.isneginf())
    assert ((lse.double() - expected_lse).abs().nan_to_num(nan=0.0) <= limit).all()
