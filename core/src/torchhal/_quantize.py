"""How a PagedKVCache quantises tokens as they are appended: scales, rounding, and what has no number."""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor

from torchhal._checks import FLOATING, storage_fault
from torchhal.errors import InvalidProblem

LARGEST: Final = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""The largest magnitude that is stored; int8's -128 is left out, so that a scale serves both signs alike."""

SMALLEST_SCALE: Final = 2.0**-126
"""The smallest normal float32: what it divides stays finite, and a device that flushes subnormal numbers keeps it."""


class Written(NamedTuple):
    """Tokens as they are stored."""

    rows: Tensor
    """(T, Hkv, E), of the pool's type."""
    scale: Tensor | None
    """(T, Hkv) float32, where each token has its own."""


def stored_type(dtype: torch.dtype, kv_dtype: torch.dtype | None) -> torch.dtype:
    """The type of a cache's pools, for tokens of type ``dtype``.

    Raises:
        InvalidProblem: ``dtype`` is not floating, or ``kv_dtype`` is nothing that tokens are quantised to.
    """
    if dtype not in FLOATING:
        known = ", ".join(str(t) for t in FLOATING)
        raise InvalidProblem(f"dtype expects a floating type ({known}) and got {dtype}")
    if kv_dtype is None:
        return dtype
    if kv_dtype not in LARGEST:
        known = " or ".join(str(t) for t in LARGEST)
        raise InvalidProblem(
            f"kv_dtype expects {known} and got {kv_dtype}; for tokens as they come leave it out"
        )
    return kv_dtype


def check_scale(name: str, scale: Tensor | None, slots: Tensor) -> Tensor | None:
    """The scale that a cache keeps for slots (P, Hkv, page_size, ...): as given, or one for each slot, or None.

    Raises:
        InvalidProblem: a scale of another shape, type or device, or that is no positive number; or where nothing is quantised.
    """
    pages, heads, page_size = slots.shape[:3]
    if slots.dtype not in LARGEST:
        if scale is not None:
            raise InvalidProblem(
                f"{name} is given and the cache stores {slots.dtype}; leave it out, or pass kv_dtype"
            )
        return None
    if scale is None:
        return slots.new_empty(pages, heads, page_size, dtype=torch.float32)
    if not isinstance(scale, Tensor):
        raise InvalidProblem(f"{name} expects a float32 tensor ({heads},) and got {type(scale).__name__}")
    fault = storage_fault(name, scale)
    if fault:
        raise InvalidProblem(fault)
    if scale.dtype is not torch.float32 or tuple(scale.shape) != (heads,):
        got = f"{scale.dtype} {tuple(scale.shape)}"
        raise InvalidProblem(f"{name} expects float32 ({heads},), one for each head, and is {got}")
    if scale.device != slots.device:
        raise InvalidProblem(
            f"{name} is on {scale.device} and the cache on {slots.device}; move it to {slots.device}"
        )
    kept = scale.detach().clone(memory_format=torch.contiguous_format)
    if not bool(((kept > 0) & kept.isfinite()).all()):
        raise InvalidProblem(f"{name} expects positive, finite numbers and is {scale.tolist()}")
    return kept


def quantized(name: str, rows: Tensor, pool: Tensor, scale: Tensor | None) -> Written:
    """Rows (T, Hkv, E) as a pool stores them, whose scale is that of :func:`check_scale`.

    Raises:
        InvalidProblem: NaN or infinity for int8 under a given scale.
    """
    if scale is None:
        return Written(rows, None)
    wide = rows.detach().to(torch.float32)
    if scale.dim() == 1:
        if pool.dtype is torch.int8 and not bool(wide.isfinite().all()):
            raise InvalidProblem(
                f"{name} hold NaN or infinity, which int8 under given scales can not; append finite numbers, or make the "
                "cache without scales or with kv_dtype=torch.float8_e4m3fn"
            )
        wide = torch.where(wide.isinf(), torch.nan, wide)
        return Written(_rounded(wide / scale[:, None], pool.dtype), None)
    largest = wide.abs().amax(-1)
    scales = (largest / LARGEST[pool.dtype]).clamp(min=SMALLEST_SCALE)
    scales = torch.where(largest.isfinite(), scales, torch.nan)
    # The scale alone makes such rows NaN: int8 has nothing that would.
    stored = torch.where(largest.isfinite()[..., None], wide / scales[..., None], 0.0)
    return Written(_rounded(stored, pool.dtype), scales)


def _rounded(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """To the nearest, ties to even, within the range; NaN stays NaN in float8_e4m3fn."""
    kept = numbers.clamp(-LARGEST[dtype], LARGEST[dtype])
    return (kept.round() if dtype is torch.int8 else kept).to(dtype)


def write(written: Written, page: Tensor, slot: Tensor, pool: Tensor, scale: Tensor | None) -> None:
    """Put tokens into slots ``slot`` (T,) of pages ``page`` (T,), with their own scales if they have any."""
    pool[page, :, slot] = written.rows
    if written.scale is not None and scale is not None:
        scale[page, :, slot] = written.scale
